"""Networks that are no models of transformers: found, folded, quantized, saved and loaded."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qtk
from qtk.discover import load
from qtk.grids import InputGrid, LinearSpec
from qtk.models import describe
from qtk.modules.conv import QuantConv2d
from qtk.modules.linear import QuantLinear
from qtk.numerics import scale_and_zero_point
from qtk.observe.trace import fold, trace
from qtk.round import to_nearest
from qtk.scheme import Scheme
from qtk.windows import Windows
from tests.networks import Net, images, settled

CONVOLUTIONS = {
    "padded": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    "same": {"kernel_size": (3, 4), "padding": "same"},
    "reflected": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "patches": {"kernel_size": 3, "stride": 3},
}
SCHEMES = [(8, 8, "tensor"), (4, 8, "tensor"), (4, 4, "token"), (3, 16, "tensor")]


def fast(net, **options):
    return qtk.quantize(net, calib=images(), progress=False, **{"preset": "fast", **options})


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_rows_times_a_flattened_weight_are_the_convolution(kind):
    conv, x = nn.Conv2d(4, 6, **CONVOLUTIONS[kind]).double(), torch.randn(2, 4, 9, 12).double()
    rows = Windows.of(conv).rows(x)
    y = rows @ conv.weight.flatten(1).T + conv.bias
    # sums of 48 products of numbers near 1, in another order
    assert torch.allclose(y.mT, conv(x).flatten(2), atol=48 * 2.0**-50)
    some = Windows.of(conv).rows(x, most=5, seed=3)
    assert some.shape[1] == 5 and all((row == rows[0]).all(1).any() for row in some[0])


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("w, a, granularity", SCHEMES)
def test_an_integer_convolution_is_the_float_one_on_its_grids(kind, w, a, granularity):
    conv, x = nn.Conv2d(4, 6, **CONVOLUTIONS[kind]), torch.randn(2, 4, 9, 12)
    scheme = Scheme.of(w, a, "static" if granularity == "tensor" else "token")
    codes, steps = to_nearest(conv.weight.detach().flatten(1), scheme.w)
    grid = InputGrid(scheme.a)
    if scheme.a is not None and granularity == "tensor":
        scale, zero_point = scale_and_zero_point(x.min(), x.max(), scheme.a)
        grid = InputGrid(scheme.a, scale=scale, zero_point=zero_point)
    spec = LinearSpec(codes.to(torch.int8), steps, grid, conv.bias.detach())
    layer = QuantConv2d.from_spec(spec, conv, "auto")
    rows = Windows.of(conv).rows(x)
    want = grid.fake_quantize(rows) @ steps.dequantize(codes).T + conv.bias
    got = layer(x)
    assert torch.allclose(got.flatten(2), want.mT, atol=1e-4)  # float32 sums of 48 products
    assert torch.equal(layer.inner.codes(), spec.codes)
    assert got.is_contiguous() and got.shape == conv(x).shape
    last = layer(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last) and torch.equal(last, got)


def test_the_float_convolution_of_an_integer_one_computes_the_same():
    for kind, options in CONVOLUTIONS.items():
        conv = nn.Conv2d(4, 6, **options)
        codes, steps = to_nearest(conv.weight.detach().flatten(1), Scheme.of(4, 16).w)
        spec = LinearSpec(codes.to(torch.int8), steps, InputGrid(None), conv.bias.detach())
        layer, x = QuantConv2d.from_spec(spec, conv, "auto"), torch.randn(2, 4, 9, 12)
        assert torch.allclose(layer.dequantized()(x), layer(x), atol=1e-5), kind


def test_gradients_pass_an_integer_convolution_as_if_nothing_was_rounded():
    net = settled(Net())
    qnet, x = fast(net), images()[0].requires_grad_()
    (mine,) = torch.autograd.grad(qnet(x)[:, 0].sum(), x)
    (wanted,) = torch.autograd.grad(net(x)[:, 0].sum(), x)
    assert F.cosine_similarity(mine.flatten(), wanted.flatten(), dim=0) > 0.95


def test_a_sample_that_holds_nan_gives_nan_and_no_other_does():
    qnet, x = fast(settled(Net())), images()[0].clone()
    x[3, 1, 4, 4] = torch.nan
    bad = qnet(x).isnan().any(1)
    assert bad[3] and bad.sum() == 1


def test_blocks_are_children_in_the_order_in_which_they_run():
    net = Net()
    assert [b.name for b in describe(net)] == [
        "head", "stem.0", "blocks.0", "blocks.1", "grouped", "unused",
    ]  # fmt: skip
    seen = trace(net.eval(), [n for b in describe(net) for n in b.linears], {"x": images()[0]})
    assert list(seen.calls) == [
        "stem.0", "blocks.0.conv1", "blocks.0.conv2", "blocks.0.shortcut", "blocks.1.conv1",
        "blocks.1.conv2", "grouped", "head",
    ]  # fmt: skip


def test_norms_that_alone_read_a_convolution_are_folded_and_the_function_stays():
    net = settled(Net())
    folded, x = copy.deepcopy(net).requires_grad_(False), images()[0]
    norms = trace(folded, [n for b in describe(net) for n in b.linears], {"x": x}).norms
    assert norms == {
        "stem.1": "stem.0", "blocks.0.bn1": "blocks.0.conv1", "blocks.0.bn2": "blocks.0.conv2",
        "blocks.1.bn2": "blocks.1.conv1",
    }  # fmt: skip
    fold(folded, norms)
    want = net(x)
    assert torch.allclose(folded(x), want, atol=float(want.abs().max()) * 1e-5)


def test_a_norm_whose_convolution_somebody_else_reads_stays():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) * y

    assert not trace(Both().eval(), ["conv"], {"x": images()[0]}).norms


@pytest.mark.parametrize("options, least", [
    ({"w": 8, "a": 8}, 28.0), ({"w": 4, "a": 8}, 11.0),
    ({"w": 8, "a": 8, "activations": "token"}, 28.0),
])  # fmt: skip
@pytest.mark.parametrize("groups", [1, 4])
def test_a_network_is_quantized_saved_and_loaded(options, least, groups, tmp_path):
    net = settled(Net(groups))
    qnet, x = fast(net, **options), images()[0]
    want, got = net(x), qnet(x)
    sqnr = 10 * torch.log10(want.square().sum() / (want - got).square().sum())
    assert sqnr > least
    qnet.save_pretrained(tmp_path)
    for given in (Net(groups), lambda: Net(groups)):
        assert torch.equal(qtk.load(tmp_path, given)(x), got)
    assert type(qnet) is Net and not any(isinstance(m, nn.BatchNorm2d) for m in [qnet.stem[1]])
    figures = qtk.evaluate(net, qnet, [(x, want.argmax(1))])
    assert figures.samples == 16 and figures.agreement >= 0.8


@pytest.mark.parametrize("family", ["resnet", "mobilenet_v1", "mobilenet_v2"])
def test_a_family_of_convolutions_is_quantized_saved_and_loaded(family, tmp_path):
    torch.manual_seed(0)
    model, _ = load("models", family).tiny()
    settled(model, lambda x: model(pixel_values=x))
    batch = {"pixel_values": images()[0]}
    qmodel = qtk.quantize(model, calib=[batch], preset="fast", progress=False)
    got, layers = qmodel(**batch).logits, qtk.summary(qmodel).layers
    # what the layers before it lost included; 52 random ones in a row amplify that
    sqnr = [layer.sqnr for layer in layers if layer.sqnr is not None]
    assert sqnr[0] > 35 and min(sqnr) > (25 if family == "resnet" else 5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in qmodel.modules())
    kinds = {layer.kernel.split()[0].rstrip(",") for layer in layers if layer.scheme != "float"}
    assert kinds == ({"im2col"} if family == "resnet" else {"im2col", "torch"})
    qmodel.save_pretrained(tmp_path)
    again = qtk.load(tmp_path)
    assert type(again) is type(model) and torch.equal(again(**batch).logits, got)
    head = "classifier.1" if family == "resnet" else "classifier"
    named = qtk.quantize(model, calib=[batch], bits={head: (8, 8)}, preset="fast", progress=False)
    assert isinstance(named.get_submodule(head), QuantLinear)


def test_a_family_of_convolutions_is_not_quantized_from_file_to_file(tmp_path):
    model, batch = load("models", "resnet").tiny()
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(qtk.SchemeError, match="a network of convolutions"):
        qtk.quantize_files(tmp_path / "model", tmp_path / "out", calib=[batch], progress=False)


def test_a_summary_says_which_convolutions_compute_in_floating_point(tmp_path):
    qnet = fast(settled(Net(groups=4)), w=8, a=8, skip=["head"])
    lines = {layer.name: layer for layer in qtk.summary(qnet).layers}
    assert lines["grouped"].scheme == "W8A16" and "grouped" in lines["grouped"].kernel
    assert lines["stem.0"].scheme == "W8A8" and lines["stem.0"].kernel.startswith("im2col")
    assert lines["head"].scheme == lines["unused"].scheme == "float"
    assert lines["blocks.0.conv1"].recipe == "none, nearest, minmax"


@pytest.mark.parametrize("rounding", ["nearest", "flipped"])
def test_weights_alone_of_a_sequential_are_quantized_with_one_batch(rounding):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)
    )
    x = images()[0]
    qnet = qtk.quantize(
        net, w=4, a=16, method="none", ranges="minmax", rounding=rounding, skip=[], calib=[x],
        progress=False,
    )  # fmt: skip
    assert [layer.scheme for layer in qtk.summary(qnet).layers] == ["W4A16", "W4A16"]
    assert F.cosine_similarity(qnet(x).flatten(), net(x).flatten(), dim=0) > 0.98


def test_every_layer_is_made_with_what_the_quantized_network_gives_it():
    """The biases make good what earlier layers lost on average: so does the whole."""
    net, x = settled(Net()), torch.cat(images())
    qnet = fast(net, w=3, a=8)
    missed = (qnet(x) - net(x)).mean(0)
    assert (missed.abs() < 0.02 * net(x).std(0)).all()


def test_named_blocks_are_quantized_and_nothing_else():
    qnet = fast(settled(Net()), blocks=["blocks.*", "head"])
    kinds = {n for n, m in qnet.named_modules() if isinstance(m, (QuantConv2d, QuantLinear))}
    assert {n.removesuffix(".linear") for n in kinds} == {
        "blocks.0.conv1", "blocks.0.conv2", "blocks.0.shortcut", "blocks.1.conv1",
        "blocks.1.conv2", "head",
    }  # fmt: skip
    assert isinstance(qnet.stem[1], nn.BatchNorm2d)


@pytest.mark.parametrize("rounding", ["nearest", "flipped"])
def test_an_interrupted_run_goes_on_to_the_same_network(rounding, tmp_path, monkeypatch):
    net, x = settled(Net()), images()[0]
    whole = fast(net, rounding=rounding)(x)
    from qtk.pipeline import keeper

    done, calls = keeper.Keeper.done, []

    def dies(self, index, block, seen):
        calls.append(block.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        done(self, index, block, seen)

    monkeypatch.setattr(keeper.Keeper, "done", dies)
    with pytest.raises(KeyboardInterrupt):
        fast(net, rounding=rounding, resume=tmp_path / "state")
    kept = sorted(p.name for p in (tmp_path / "state").glob("block-*"))
    assert kept == ["block-0.safetensors", "block-1.safetensors"]
    monkeypatch.setattr(keeper.Keeper, "done", done)
    again = fast(net, rounding=rounding, resume=tmp_path / "state")
    assert torch.equal(again(x), whole)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return self.layer(self.layer(x))


class Nameless(nn.Sequential):
    def forward(self, *x):
        return super().forward(x[0])


@pytest.mark.parametrize("net, options, told", [
    (Net(), {"calib": None}, "pass calib="),
    (nn.Sequential(nn.ReLU()), {}, "has no Conv2d and no Linear"),
    (Net(), {"blocks": ["nothing*"]}, "no such module of Net"),
    (Net(), {"blocks": 3}, "patterns of module names"),
    (Net(), {"learn": "block"}, "learn='block'"),
    (Net(), {"ranges": "hessian"}, "need gradients"),
    (Net(), {"attention": "int8"}, "attention"),
    (Net(), {"bits": "auto"}, "give w, a and bits"),
    (Net(), {"calib": ["a text"]}, "pass tokenizer="),
    (Net(), {"calib": [torch.randn(2, 4, 9)]}, "cannot read calibration batch 0"),
    (Net(4), {"w": "fp8", "a": "fp8", "preset": None}, "grouped convolution has no FP8"),
    (Twice(), {"calib": [torch.randn(2, 16)]}, "layer runs 2 times"),
    (Nameless(nn.Linear(4, 4)), {"calib": [torch.randn(2, 4)]}, "no first argument with a name"),
])  # fmt: skip
def test_what_cannot_be_done_is_said(net, options, told):
    with pytest.raises(qtk.QtkError, match=told):
        fast(net, **options) if "calib" not in options else qtk.quantize(
            net, progress=False, **options
        )


def test_a_folder_of_a_network_asks_for_it_and_refuses_another(tmp_path: Path):
    fast(settled(Net())).save_pretrained(tmp_path)
    with pytest.raises(qtk.CheckpointError, match=r"give it, qtk\.load\(.*, Net\(\)\)"):
        qtk.load(tmp_path)
    with pytest.raises(qtk.CheckpointError, match="has no such"):
        qtk.load(tmp_path, nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(qtk.CheckpointError, match="of another network"):
        qtk.load(tmp_path, Net(classes=7))
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-9] ^= 1
    (tmp_path / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(qtk.CheckpointError, match="not what was saved"):
        qtk.load(tmp_path, Net())


def test_a_network_in_half_precision_stays_in_it():
    net = settled(Net()).bfloat16()
    qnet = qtk.quantize(net, calib=[images()[0]], preset="fast", progress=False)
    assert qnet(images()[0].bfloat16()).dtype == torch.bfloat16
