"""decompose-products, and addmm and baddbmm: every bit is kept, and they run as their policy says."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcompile import lpcompile, report
from lpcompile.api import run_state
from lpcompile.policy.resolve import Policy


class Apply(nn.Module):
    """One function of two inputs and a weight."""

    def __init__(self, function: Callable[..., Tensor], *weight_shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(weight_shape, generator=torch.Generator().manual_seed(7)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(x, y, self.weight)


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _einsum(equation: str) -> Callable[..., Tensor]:
    return lambda x, y, w: torch.einsum(equation, x, y) * w


_ENDS = (5, 5, 12, 17)  # an expert without tokens; the last three rows are nobody's

CASES: dict[str, tuple[Apply, tuple[Tensor, Tensor], str, int]] = {
    "einsum-attention": (Apply(_einsum("bqhd,bkhd->bhqk"), 1), (_randn(2, 5, 3, 8), _randn(2, 4, 3, 8)), "einsum_0", 1),
    "einsum-implicit": (Apply(_einsum("ij, jk"), 1), (_randn(5, 6), _randn(6, 7)), "einsum_0", 1),
    "einsum-two-sums": (Apply(_einsum("abij,jicb->cab"), 1), (_randn(2, 3, 4, 5), _randn(5, 4, 6, 3)), "einsum_0", 1),
    "einsum-many-rows": (Apply(_einsum("abk,ckd->badc"), 1), (_randn(2, 3, 4), _randn(5, 4, 6)), "einsum_0", 1),
    "addmm": (Apply(lambda x, y, w: torch.addmm(y, x, w), 6, 7), (_randn(5, 6), _randn(5, 7)), "addmm_0", 1),
    "addmm-row": (Apply(lambda x, y, w: y.addmm(x, w), 6, 7), (_randn(5, 6), _randn(7)), "addmm_0", 1),
    "baddbmm": (
        Apply(lambda x, y, w: torch.baddbmm(y, x, batch2=w), 3, 6, 7),
        (_randn(3, 5, 6), _randn(3, 5, 7)),
        "baddbmm_0",
        1,
    ),
    "grouped": (
        Apply(lambda x, offs, w: F.grouped_mm(x, w.transpose(-2, -1), offs=offs), 4, 8, 16),
        (_randn(20, 16), torch.tensor(_ENDS, dtype=torch.int32)),
        "grouped_mm_0",
        4,
    ),
    "grouped-kn": (
        Apply(lambda x, offs, w: F.grouped_mm(x, w, offs=offs), 4, 16, 8),
        (_randn(17, 16), torch.tensor(_ENDS, dtype=torch.int32)),
        "grouped_mm_0",
        4,
    ),
}


def _run(module: Apply, inputs: tuple[Tensor, Tensor], rows: int | None = None) -> list[Tensor]:
    """The output and the gradients of the inputs and the weight. Only the first `rows` rows if given: torch leaves the
    rows of no group undefined.
    """
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    module.zero_grad()
    y = module(*leaves)[:rows]
    y.backward(_randn(*y.shape))
    grads = [leaf.grad[:rows] for leaf in leaves if leaf.grad is not None]
    return [y.detach(), *grads, *([] if module.weight.grad is None else [module.weight.grad])]


def _policy(**operand: object) -> Policy:
    """Every product in one format, forward and backward."""
    roles = {"fwd": {"x": operand, "w": operand}, "bwd": {"dy": operand, "w": operand}}
    roles["grad"] = {"dy": operand, "x": operand}
    return Policy.model_validate({"version": 1, "name": "p", "rules": [{"match": {"name": "*"}, **roles}]})


@pytest.mark.parametrize("case", CASES)
def test_every_bit_is_kept(case: str) -> None:
    module, inputs, name, calls = CASES[case]
    rows = _ENDS[-1] if case.startswith("grouped") else None
    expected = _run(module, inputs, rows)
    lpcompile(module, "fp32-emulated", inputs, strict=True)
    assert {row.name for row in report(module).gemms} == {name}
    found = _run(module, inputs, rows)
    assert run_state(module).gemm_calls == (1 if case.startswith("grouped") else calls), (
        "the identity is torch's own call"
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_einsum_that_torch_multiplies_from_the_right() -> None:
    module, inputs = Apply(_einsum("abk,ckd->dcba"), 1), (_randn(2, 3, 4), _randn(5, 4, 6))
    expected = _run(module, inputs)
    lpcompile(module, "fp32-emulated", inputs, strict=True)
    for found, wanted in zip(_run(module, inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("operand", [{"format": "bf16"}, {"format": "e4m3", "scale": {"rule": "amax"}}], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_low_precision_is_near_and_not_equal(case: str, operand: dict[str, object]) -> None:
    module, inputs, _, _ = CASES[case]
    rows = _ENDS[-1] if case.startswith("grouped") else None
    lpcompile(module, "fp32", inputs)
    expected = _run(module, inputs, rows)
    lpcompile(module, _policy(**operand), inputs, strict=True)
    for found, wanted in zip(_run(module, inputs, rows), expected, strict=True):
        assert F.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.99
    assert not torch.equal(module(*inputs)[:rows], expected[0])


def test_another_distribution_of_tokens_uses_the_same_graph() -> None:
    module, (x, _), _, _ = CASES["grouped"]
    lpcompile(module, "fp32-emulated", (x, torch.tensor(_ENDS, dtype=torch.int32)))
    for ends in ((20, 20, 20, 20), (0, 0, 0, 20), (3, 9, 10, 20)):
        offs = torch.tensor(ends, dtype=torch.int32)
        wanted = torch.cat([F.linear(x[a:b], w) for a, b, w in zip((0, *ends), ends, module.weight)])
        assert torch.equal(module(x, offs), wanted)
    assert not report(module).unserved


def test_experts_do_not_share_stochastic_bits() -> None:
    """Two experts with equal rows and equal weights: rounded stochastically, the rows differ."""
    operand = {"format": "e4m3", "rounding": "stochastic"}
    rule = {"match": {"op": "linear"}, "fwd": {"x": operand, "w": "fp32"}}
    module = Apply(lambda x, offs, w: F.grouped_mm(x, w, offs=offs), 2, 16, 8)
    with torch.no_grad():
        module.weight[1] = module.weight[0]
    x = _randn(4, 16).repeat(2, 1)
    inputs = (x, torch.tensor([4, 8], dtype=torch.int32))
    lpcompile(module, Policy.model_validate({"version": 1, "name": "p", "rules": [rule]}), inputs, strict=True)
    first, second = module(*inputs).chunk(2)
    assert not torch.equal(first, second)
