"""e4m3 by e4m3: Triton on a GPU from sm_89 on; elsewhere float32 on the same values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtk.errors import BackendError
from qtk.modules.products import Operands, Product
from qtk_kernels.fp8_linear import E4M3, fp8_linear, fp8_linear_kernel_name

PREFERENCE = 0
CAPABILITY = (8, 9)  # of the first GPUs that multiply e4m3


@dataclass(frozen=True)
class Fp8(Product):
    """Holds the bytes as e4m3; one scale for each output channel."""

    operand: Tensor
    scale: Tensor
    bias: Tensor | None
    backend: str
    activation: str | None = None

    @property
    def name(self) -> str:
        name = fp8_linear_kernel_name(self.operand, backend=self.backend)
        return name if self.backend == "triton" else f"{name}, fake quantization to e4m3"

    def __call__(
        self, q: Tensor, scale: Tensor | None, out_dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return fp8_linear(
            q, self.operand, self.scale, self.bias, x_scale=scale, activation=self.activation,
            out_dtype=out_dtype, backend=self.backend,
        )  # fmt: skip

    def codes(self) -> Tensor:
        return self.operand.view(torch.int8)


def fits(operands: Operands, backend: str) -> bool:
    return operands.a is not None and operands.a.kind == "e4m3"


def prepare(operands: Operands, backend: str) -> Fp8:
    codes = operands.codes
    if codes.is_cuda and torch.cuda.get_device_capability(codes.device) < CAPABILITY:
        raise BackendError(
            f"FP8 needs a GPU of compute capability 8.9 or more, and {codes.device} has less; "
            "quantize with w=8, a=8"
        )
    return Fp8(codes.contiguous().view(E4M3), operands.scale, operands.bias, backend)
