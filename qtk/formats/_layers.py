"""Quantized layers as nodes of ONNX.

Static W8A8 is QDQ: codes of the input, dequantized by 1, times dequantized int8 weights. Step and
zero point of the input are in the weights' scales and in the bias, so that runtimes find an integer
product with a scale per channel behind it and nothing else.

    codes = QuantizeLinear(x * multiplier + offset)                     uint8
    y = MatMul(DequantizeLinear(codes), DequantizeLinear(W)) + b'

Weights alone are `MatMulNBits` of ONNX Runtime's domain, which OpenVINO reads too. Layers that read
one tensor on one grid are joined into one product. An embedding is a gather of codes and scales.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qtk.errors import SchemeError
from qtk.formats._trace import DOMAIN
from qtk.grids import InputGrid, LinearSpec, Steps
from qtk.modules.embedding import QuantEmbedding

RUNTIME = "com.microsoft"  # the domain of ONNX Runtime's own operators
CODES = 128  # added to signed codes of 8 bits: x86 runtimes multiply unsigned ones by signed ones
SMALLEST, WIDEST = 16, 128  # channels of a block of MatMulNBits


def check(linears: Mapping[str, LinearSpec]) -> None:
    """Raises SchemeError for the first layer that ONNX has no form for, with the remedy."""
    for name, spec in linears.items():
        if fault := _fault(spec):
            raise SchemeError(f"{name} is {spec.scheme.name}: {fault}")


def _fault(spec: LinearSpec) -> str | None:
    """Why a layer has no form, and what to do."""
    scheme, grid = spec.scheme, spec.grid
    assert scheme.w is not None
    if scheme.w.kind != "int":
        return "ONNX runtimes have no e4m3 product on CPUs; quantize with w=8, a=8"
    if grid.change.rotation:
        return (
            "it rotates its input, which costs a dense product in ONNX; quantize with "
            "method='os+' or another without rotation"
        )
    if scheme.a is None:
        if _block_size(scheme.w.group_size) is None:
            return f"MatMulNBits has groups of multiples of {SMALLEST}; quantize with such a size"
        return None
    if scheme.a.granularity != "tensor":
        return "ONNX has no scale per token; quantize with activations='static' and calib"
    if (scheme.w.bits, scheme.a.bits) != (8, 8):
        return "ONNX has integer products of 8 bits alone; quantize with w=8, a=8, or a=16"
    if scheme.w.group_size is not None and spec.steps.scale.shape[1] > 1:
        return "an integer product has one scale a channel; quantize without group_size"
    return None


def write(proto: Any, linears: Mapping[str, LinearSpec], tables: Mapping[str, Any]) -> None:
    """Replaces the nodes of the domain "qtk" by what computes them, in place.

    Args:
        proto: `onnx.ModelProto` from `_trace.traced`.
        linears, tables: the layers that its nodes name.
    """
    from onnx import helper

    graph = proto.graph
    for node in graph.node:
        del node.metadata_props[:]  # stack traces, with paths of this machine
    joined = {group[0][0].output[0]: group for group in _joined(graph, linears)}
    others = {node.output[0] for group in joined.values() for node, _ in group[1:]}
    norms = _private_norms(graph, joined.values())
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    nodes, uses = [], Counter[str]()
    for node in graph.node:
        if node.domain == DOMAIN:
            layer = _layer_of(node)
            uses[layer] += 1
            writer = Writer(graph, layer if uses[layer] == 1 else f"{layer}.{uses[layer]}")
        if node.output[0] in joined:
            group = joined[node.output[0]]
            nodes += writer.linears(group, norms.get(node.input[0]), ranks.get(node.input[0], 3))
        elif node.domain == DOMAIN and node.op_type == "Embedding":
            nodes += writer.embedding(node, tables[layer])
        elif node.output[0] not in others:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    _clean(proto)
    used = {node.domain for node in graph.node}
    versions = [entry for entry in proto.opset_import if entry.domain in used]
    if RUNTIME in used:
        versions.append(helper.make_opsetid(RUNTIME, 1))
    del proto.opset_import[:]
    proto.opset_import.extend(versions)


Group = list[tuple[Any, LinearSpec]]  # nodes that read one tensor on one grid


def _joined(graph: Any, linears: Mapping[str, LinearSpec]) -> Iterator[Group]:
    """The linear nodes, those together that can be one product."""
    by_input: dict[str, list[Group]] = defaultdict(list)
    for node in graph.node:
        if node.domain != DOMAIN or node.op_type != "Linear":
            continue
        spec = linears[_layer_of(node)]
        for group in by_input[node.input[0]]:
            if _same(group[0][1], spec):
                group.append((node, spec))
                break
        else:
            by_input[node.input[0]].append([(node, spec)])
    for groups in by_input.values():
        yield from groups


def _same(one: LinearSpec, other: LinearSpec) -> bool:
    """Whether two layers read the same grid and have weights of one format."""
    if one.scheme != other.scheme or (one.bias is None) != (other.bias is None):
        return False
    return all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(_numbers(one.grid), _numbers(other.grid), strict=True)
    )


def _numbers(grid: InputGrid) -> tuple[Tensor | None, ...]:
    return grid.scale, grid.zero_point, grid.change.shift, grid.change.channel_scale


def _private_norms(graph: Any, groups: Iterable[Group]) -> dict[str, Any]:
    """LayerNorms whose output one group of linears alone reads, by that output."""
    readers: dict[str, int] = defaultdict(int)
    for node in graph.node:
        for name in node.input:
            readers[name] += 1
    for output in graph.output:
        readers[output.name] += 1
    wanted = {group[0][0].input[0]: len(group) for group in groups}
    return {
        node.output[0]: node for node in graph.node
        if node.op_type == "LayerNormalization" and len(node.input) == 3
        and readers[node.output[0]] == wanted.get(node.output[0])
    }  # fmt: skip


def _layer_of(node: Any) -> str:
    """The layer that a placeholder's node names."""
    return str(next(a.s for a in node.attribute if a.name == "layer").decode())


def _clean(proto: Any) -> None:
    """Drops what nothing reads, and where the exporter says how it came to be."""
    graph = proto.graph
    used = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:], graph.value_info[:], graph.metadata_props[:]
    del proto.metadata_props[:]
    for tensor in kept:
        del tensor.metadata_props[:]
    graph.initializer.extend(kept)
    proto.producer_name, proto.doc_string, graph.doc_string, graph.name = "qtk", "", "", "qtk"


@dataclass
class Writer:
    """Nodes and constants of one layer, whose names start with the layer's."""

    graph: Any
    prefix: str
    nodes: list[Any] = field(default_factory=list)

    def linears(self, group: Group, norm: Any, rank: int) -> list[Any]:
        """The nodes of linears that are one product.

        Args:
            norm: the LayerNorm before them that nobody else reads, or None.
            rank: of the tensor that they read.
        """
        specs = [spec for _, spec in group]
        weight_only = specs[0].scheme.a is None
        x, is_matrix = group[0][0].input[0], rank == 2
        if is_matrix:  # ONNX Runtime takes product and bias of a matrix for a float Gemm
            axis = self.constant("axis", np.array([0], np.int64))
            x = self.node("Unsqueeze", [x, axis], f"{self.prefix}.batch")
        y = self._weights_alone(x, specs, norm) if weight_only else self._qdq(x, specs, norm)
        bias = _bias(specs)
        outputs = [node.output[0] for node, _ in group]
        if bias is not None:
            y = self.node("Add", [y, self.constant("bias", bias)], f"{self.prefix}.biased")
        if is_matrix:
            y = self.node("Squeeze", [y, axis], f"{self.prefix}.matrix")
        sizes = np.array([len(spec.codes) for spec in specs], np.int64)
        if len(outputs) > 1:
            self.node("Split", [y, self.constant("widths", sizes)], *outputs, axis=-1)
        else:
            self.nodes[-1].output[0] = outputs[0]
        return self.nodes

    def _qdq(self, x: str, specs: list[LinearSpec], norm: Any) -> str:
        """Codes of the input times codes of the weights."""
        grid = specs[0].grid
        assert grid.static is not None
        one, zero = self.constant("one", np.float32(1)), self.constant("zero", np.uint8(0))
        _, affine = grid.affines(CODES)
        assert affine is not None
        x = self._affine(x, affine, norm)
        codes = self.node("QuantizeLinear", [x, one, zero], f"{self.prefix}.codes")
        floats = self.node("DequantizeLinear", [codes, one, zero], f"{self.prefix}.floats")
        levels = torch.cat([spec.codes for spec in specs]).T.contiguous()
        scale = torch.cat([spec.steps.scale for spec in specs]).flatten() * grid.static[0]
        weight = self.node(
            "DequantizeLinear",
            [
                self.constant("weight", levels), self.constant("scale", scale),
                self.constant("weight_zero", torch.zeros(len(scale), dtype=torch.int8)),
            ],
            f"{self.prefix}.dequantized", axis=1,
        )  # fmt: skip
        return self.node("MatMul", [floats, weight], f"{self.prefix}.product")

    def _weights_alone(self, x: str, specs: list[LinearSpec], norm: Any) -> str:
        """Floats times codes that are dequantized as they are read."""
        change = specs[0].grid.change.affine
        if change is not None:
            x = self._affine(x, change, norm)
        packed = [Blocks.of(spec) for spec in specs]
        inputs = [
            x, self.constant("weight", np.concatenate([p.codes for p in packed])),
            self.constant("scale", np.concatenate([p.scale for p in packed])),
        ]  # fmt: skip
        if packed[0].zeros is not None:
            zeros = [p.zeros for p in packed if p.zeros is not None]
            inputs.append(self.constant("zero_point", np.concatenate(zeros)))
        K = specs[0].codes.shape[1]
        return self.node(
            "MatMulNBits", inputs, f"{self.prefix}.product", domain=RUNTIME, K=K,
            N=sum(len(spec.codes) for spec in specs), bits=packed[0].bits, accuracy_level=1,
            block_size=packed[0].size,
        )  # fmt: skip

    def embedding(self, node: Any, table: QuantEmbedding) -> list[Any]:
        """Rows of codes and of scales, multiplied."""
        ids, y, K = node.input[0], node.output[0], table.in_features
        codes = self.constant("weight", table.codes())
        rows = self.node("Gather", [codes, ids], f"{self.prefix}.rows")
        x = self.node("Cast", [rows], f"{self.prefix}.levels", to=1)
        if table.weight_zero_point is not None:
            x = self.node("Sub", [x, self._of_row("zero_point", table.weight_zero_point, ids, K,
                                                  table.w.group_size)],
                          f"{self.prefix}.centred")  # fmt: skip
        scale = self._of_row("scale", table.weight_scale, ids, K, table.w.group_size)
        self.node("Mul", [x, scale], y)
        return self.nodes

    def _of_row(self, name: str, values: Tensor, ids: str, K: int, group: int | None) -> str:
        """Scales or zero points [N, G] of the rows, [..., 1] or [..., K]."""
        rows = self.node("Gather", [self.constant(name, values.float()), ids],
                         f"{self.prefix}.{name}s")  # fmt: skip
        if values.shape[1] == 1 or group is None:
            return rows
        which = self.constant(f"{name}_group", np.arange(K, dtype=np.int64) // group)
        return self.node("Gather", [rows, which], f"{self.prefix}.{name}_each", axis=-1)

    def _affine(self, x: str, affine: tuple[Tensor, Tensor], norm: Any) -> str:
        """x * multiplier + offset, inside the LayerNorm that gives x where that is theirs alone."""
        multiplier, offset = (part.float() for part in affine)
        if norm is not None:
            gamma, beta = (self._value(name) for name in norm.input[1:])
            norm.input[1] = self.constant("norm_weight", gamma * multiplier)
            norm.input[2] = self.constant("norm_bias", beta * multiplier + offset)
            return x
        scaled = self.node("Mul", [x, self.constant("multiplier", multiplier)],
                           f"{self.prefix}.scaled")  # fmt: skip
        return self.node("Add", [scaled, self.constant("offset", offset)],
                         f"{self.prefix}.shifted")  # fmt: skip

    def _value(self, name: str) -> Tensor:
        from onnx import numpy_helper

        found = next(tensor for tensor in self.graph.initializer if tensor.name == name)
        return torch.from_numpy(numpy_helper.to_array(found).copy())

    def constant(self, name: str, value: Any) -> str:
        """An initializer; returns its name."""
        from onnx import numpy_helper

        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        full = f"{self.prefix}.{name}"
        self.graph.initializer.append(numpy_helper.from_array(array, full))
        return full

    def node(self, kind: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        """A node; returns the name of its first output."""
        from onnx import helper

        made = helper.make_node(kind, inputs, list(outputs), name=outputs[0], **attributes)
        self.nodes.append(made)
        return outputs[0]


def _bias(specs: list[LinearSpec]) -> Tensor | None:
    """[N] float32 of all, with what the input's zero point adds."""
    parts = []
    for spec in specs:
        bias = torch.zeros(len(spec.codes)).double() if spec.bias is None else spec.bias.double()
        if spec.grid.static is not None:
            step, zero_point = (value.double().cpu() for value in spec.grid.static)
            scale = step * spec.steps.scale.double().flatten().cpu()
            bias = bias.cpu() - (zero_point + CODES) * scale * spec.codes.double().sum(1).cpu()
        parts.append(bias.cpu())
    nothing = specs[0].bias is None and specs[0].grid.static is None
    return None if nothing else torch.cat(parts).float()


@dataclass(frozen=True)
class Blocks:
    """A weight [N, K] as MatMulNBits reads it. G blocks a row.

    Attributes:
        bits: 4 or 8; narrower codes take the next of these.
        size: input channels of a block.
        codes: [N, G, size * bits / 8] uint8, the low half of a byte first.
        scale: [N, G] float32.
        zeros: [N, G * bits / 8] uint8, None for the middle of the codes.
    """

    bits: int
    size: int
    codes: np.ndarray
    scale: np.ndarray
    zeros: np.ndarray | None

    @classmethod
    def of(cls, spec: LinearSpec) -> "Blocks":
        (N, K), steps, w = spec.codes.shape, spec.steps, spec.steps.fmt
        bits = 4 if w.bits <= 4 else 8
        size = _block_size(w.group_size)
        assert size is not None
        G, middle = -(-K // size), 2 ** (bits - 1)
        codes = np.full((N, G * size), middle, np.int64)
        codes[:, :K] += spec.codes.cpu().numpy()
        zeros = None
        if steps.zero_point is not None:
            each = _of_blocks(steps.zero_point, steps, G, size) + middle
            codes[:, K:] = np.repeat(each, size, 1)[:, K:]  # the padding is zero
            zeros = _packed(each, bits)
        scale = _of_blocks(steps.scale, steps, G, size).astype(np.float32)
        return cls(bits, size, _packed(codes, bits).reshape(N, G, -1), scale, zeros)


def _block_size(group: int | None) -> int | None:
    """Channels of a block, a power of two; None where groups are not made of such blocks."""
    size = WIDEST if group is None else group & -group
    return size if size >= SMALLEST else None


def _of_blocks(values: Tensor, steps: Steps, blocks: int, size: int) -> np.ndarray:
    """[N, groups] -> [N, blocks]: what each block's group has."""
    group = steps.fmt.group_size
    array: np.ndarray = values.float().cpu().numpy()
    if group is None or array.shape[1] == 1:
        return np.repeat(array[:, :1], blocks, 1)
    return array[:, np.arange(blocks) * size // group]


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes [N, K] to bytes, the first of two in the low half."""
    found = codes.astype(np.uint8)
    if bits == 8:
        return found
    found = np.pad(found, ((0, 0), (0, found.shape[1] % 2)))
    packed: np.ndarray = found[:, 0::2] | found[:, 1::2] << 4
    return packed
