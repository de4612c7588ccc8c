"""Self-test: the products of a kernel against exact ones, on this machine, with operands of the formats it is given.

What a library gives depends on the CPU: without VNNI units oneDNN adds pairs of int8 products in 16 bits, where
127 * 127 + 127 * 127 saturates, and torch._int_mm reads a matrix of one column with the strides of a row. So a kernel
is trusted for what was seen here: at its first use for a pair of formats it multiplies small matrices, in every layout
and with sides of 1, and declines if one product is off by more than it claims. A process asks once.
"""

from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from runtime.kernels.fake import beside_tracing
from runtime.kernels.request import GemmRequest
from runtime.numerics import reference_gemm
from runtime.numerics.format_kinds import Format, IntFormat
from runtime.numerics.grid import round_to_grid
from runtime.numerics.reference_gemm import RandomKey
from runtime.numerics.specs import GemmSpec

if TYPE_CHECKING:
    from runtime.kernels.registry import AbstractKernel

SHAPES = ((1, 1, 1), (5, 1, 3), (8, 1, 1), (1, 1, 8), (1, 9, 4), (6, 9, 1), (1, 64, 1), (8, 64, 8), (17, 33, 9))
"""M, K, N: each side of 1 with the others not, and sizes that no vector divides."""
_KEY = RandomKey(seed=1, step=2, stream=3)


def fault_of(kernel: "AbstractKernel", request: GemmRequest) -> str:
    """What is wrong with the kernel's products on this machine; "" if nothing, or where there is no such device."""
    if kernel.num_units(request, 1) is None or (request.device == "cuda" and not torch.cuda.is_available()):
        return ""
    if request.device not in ("cpu", "cuda"):
        return ""
    return _fault(kernel, request.spec, request.device, torch.get_float32_matmul_precision())


@lru_cache(maxsize=4096)
def _fault(kernel: "AbstractKernel", spec: GemmSpec, device: str, precision: str) -> str:
    """`precision` is torch's global one, which decides what the products of fp32 matrices are."""
    request = GemmRequest("linear", "fwd", spec, device)
    with beside_tracing(), torch.no_grad(), torch.autocast(device, enabled=False):
        generator = torch.Generator("cpu").manual_seed(1)
        for (m, k, n), is_extreme, lhs_order, rhs_order in product(SHAPES, (False, True), "rc", "rc"):
            if is_extreme and not all(isinstance(row, IntFormat) for row in request.rows):
                continue
            a = _laid_out(_values(m, k, request.rows[0], is_extreme, generator), lhs_order).to(device)
            b = _laid_out(_values(k, n, request.rows[1], is_extreme, generator), rhs_order).to(device)
            got = kernel.multiply(kernel.load(a), kernel.load(b), spec, _KEY).cpu().double()
            want, room = _wanted(kernel, request, a.cpu(), b.cpu())
            if got.shape != want.shape or not bool(((got - want).abs() <= room).all()):
                worst = int((got - want).abs().argmax()) if got.shape == want.shape else 0
                return (
                    f"on this machine its product of M, K, N = {m}, {k}, {n} is wrong: "
                    f"{got.flatten()[worst]:g}, not {want.flatten()[worst]:g}"
                )
    return ""


def _wanted(kernel: "AbstractKernel", request: GemmRequest, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The product, and by how much one may differ."""
    units = kernel.num_units(request, a.shape[-1])
    assert units is not None
    if units == 0:
        want = reference_gemm.multiply(a, b, request.spec, _KEY).double()
        return want, torch.zeros_like(want)
    exact = a.double() @ b.double()
    return exact, units * 2.0**-24 * (a.double().abs() @ b.double().abs())


def _values(rows: int, columns: int, row: Format, is_extreme: bool, generator: torch.Generator) -> Tensor:
    """Grid values in fp32. Of integers from the whole range, or all at its ends."""
    if isinstance(row, IntFormat):
        low, high = max(row.min, -(2.0**24)), min(row.max, 2.0**24)
        ends = torch.rand(rows, columns, generator=generator, dtype=torch.float64, device="cpu")
        inside = torch.round(low + ends * (high - low)).float()
        return torch.full((rows, columns), high, dtype=torch.float32, device="cpu") if is_extreme else inside
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")
    return round_to_grid(values, row, "nearest_even")


def _laid_out(x: Tensor, order: str) -> Tensor:
    """The same values, by rows or by columns in memory."""
    return x if order == "r" else x.t().clone(memory_format=torch.contiguous_format).t()
