"""lp.gemm does not see the sign of a zero in its input: sums of several products begin at +0.

The pass place-regions relies on it: relu of a cast gives -0 where the cast of a relu gives +0.
"""

import itertools

import pytest
import torch

from runtime.kernels.registry import choose
from runtime.kernels.request import GemmRequest
from runtime.numerics.specs import ROLES, LayerSpec
from runtime.ops.contractions import ConvGeometry
from runtime.ops.dialect import OPS
from runtime.ops.plan import print_geometry
from runtime.state import RunState

_GEMM, _QUANTIZE = OPS["lp.gemm"].run, OPS["lp.quantize"].run
_GEOMETRY = print_geometry(ConvGeometry((1, 1), (1, 1), (1, 1), 1))


def _operands(kind: str, m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x with many zeros, and rows that are nothing else; w of both signs."""
    shapes = {
        "linear": ((m, k), (n, k)),
        "linear_kn": ((m, k), (k, n)),
        "matmul": ((2, m, k), (2, k, n)),
        "conv": ((m, k, 4, 4), (n, k, 3, 3)),
    }
    generator = torch.Generator().manual_seed(k)
    x, w = (torch.randn(shape, generator=generator) for shape in shapes[kind])
    x = x * (torch.rand(x.shape, generator=generator) > 0.5)
    x[0] = 0.0
    return x, w


@pytest.mark.parametrize("kind", ["linear", "linear_kn", "matmul", "conv"])
@pytest.mark.parametrize("cast", ["e4m3 nearest_even", "fp16 nearest_even", "1-6-9 nearest_even"])
@pytest.mark.parametrize("sums", ["fp32 -> fp32", "fp32 -> bf16", "dlfloat16/64 -> fp32", "1-6-9 toward_zero -> fp32"])
def test_zeros_of_either_sign_give_the_same_bits(kind: str, cast: str, sums: str) -> None:
    spec = "; ".join(f"{role}: {cast} * {cast} -> {sums}" for role in ROLES)
    method = choose(GemmRequest(kind, "fwd", LayerSpec.parse(spec).fwd, "cpu")).kernel
    attributes = {"kind": kind, "spec": spec, "kernels": f"{method},{method},{method}", "site": 0}
    if kind == "conv":
        attributes["geometry"] = _GEOMETRY
    for k, m, n in itertools.product((2, 3, 16, 70), (1, 5), (1, 32)):
        x, w = _operands(kind, m, n, k)
        q_w = _QUANTIZE(w, None, None, spec=cast, site=0, slot=1)
        results = []
        for zero in (0.0, -0.0):
            q = _QUANTIZE(x, None, None, spec=cast, site=0, slot=0)
            q = torch.where(q == 0, torch.tensor(zero, dtype=q.dtype), q)
            later = (None,) * 4
            with torch.no_grad():
                results.append(_GEMM(x, w, None, q, None, q_w, None, *later, RunState(seed=0), **attributes))
        assert torch.equal(results[0].view(torch.int32), results[1].view(torch.int32)), (k, m, n)
