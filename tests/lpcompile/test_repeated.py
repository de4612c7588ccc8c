"""Products that one forward runs several times: under stochastic rounding each run would draw the same bits, so the
site is refused by name.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lpcompile import Policy, lpcompile, report
from lpcompile.errors import LoweringError
from lpcompile.programs import program_of
from passes.ir.parser import parse_program
from passes.ir.printer import print_program
from passes.manager import parse_passes, run_passes
from passes.pipelines import PASSES, PIPELINES

REASON = "one forward runs it several times: stochastic rounding would draw the same bits each time"


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(self.a(x)))


class Square(nn.Module):
    """A product written as an operation, and a leaf, in a module that may be called again."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x @ x.mT @ x)


class Blocks(nn.Module):
    """Albert's way: one block for every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Square(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.block(x)
        return self.head(x)


class Tied(nn.Module):
    """One leaf at two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Square(), Square()
        self.second.a = self.first.a

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.fixture
def stochastic() -> Policy:
    cast = {"format": "e4m3", "rounding": "stochastic"}
    return Policy.model_validate(
        {"version": 1, "name": "p", "rules": [{"match": {}, "bwd": {"dy": cast, "w": "e4m3"}}]}
    )


@pytest.mark.parametrize(
    ("make", "repeated", "once"),
    [
        (Twice, {"a"}, {"b"}),
        (Blocks, {"block.a", "block.matmul_0", "block.matmul_1"}, {"head"}),
        (Tied, {"first.a"}, {"first.matmul_0", "first.matmul_1", "second.matmul_0", "second.matmul_1"}),
    ],
)
def test_they_are_refused_by_name(
    make: Callable[[], nn.Module], repeated: set[str], once: set[str], stochastic: Policy
) -> None:
    x = torch.randn(4, 8)
    model = lpcompile(make(), stochastic, example_inputs=(x,))
    rows = report(model).gemms
    assert {row.name for row in rows if REASON in row.reason} == repeated
    assert {row.name for row in rows if row.runs_as_policy_says} == once
    with pytest.raises(LoweringError, match=REASON):
        lpcompile(make(), stochastic, example_inputs=(x,), strict=True)


@pytest.mark.parametrize("make", [Twice, Blocks, Tied])
def test_other_rounding_is_not_refused(make: Callable[[], nn.Module]) -> None:
    lpcompile(make(), "hfp8", example_inputs=(torch.randn(4, 8),), strict=True)


def test_a_text_says_it_too(stochastic: Policy) -> None:
    text = print_program(program_of(Twice(), stochastic, (torch.randn(4, 8),)))
    program = parse_program(text, "text")
    run_passes(program, parse_passes(PIPELINES["train"], PASSES))
    assert program.refusals == {"a": REASON}


def test_training_and_evaluation_are_two_forwards(stochastic: Policy) -> None:
    """Two graphs of one module, each of which calls the leaf once."""

    class ByMode(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) if self.training else self.a(self.b(x))

    lpcompile(ByMode(), stochastic, example_inputs=(torch.randn(4, 8),), strict=True)
