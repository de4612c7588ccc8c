"""Products that one forward runs several times: each run draws bits of its own (test_stochastic_calls.py). Recorded
graphs do not count their calls, and refuse them by name.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lpcompile import Policy, lpcompile
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


@pytest.mark.parametrize("make", [Twice, Blocks, Tied])
@pytest.mark.parametrize("is_stochastic", [False, True])
def test_they_run_as_the_policy_says(make: Callable[[], nn.Module], is_stochastic: bool, stochastic: Policy) -> None:
    policy = stochastic if is_stochastic else "hfp8"
    lpcompile(make(), policy, example_inputs=(torch.randn(4, 8),), strict=True)


def test_a_text_refuses_them_by_name(stochastic: Policy) -> None:
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
