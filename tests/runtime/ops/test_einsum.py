"""Einsum as one batched product: any equation of two operands that is one, against torch.einsum in float64."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.ops import einsum
from runtime.ops.einsum import Labels, from_matrices, left_matrices, right_matrices, why_no_product


@st.composite
def equations(draw: st.DrawFn) -> tuple[str, dict[str, int]]:
    """An equation with at least one row, column and summed label, in any order of dims, and the size of each label."""
    labels = draw(st.permutations("abcdeFGH"))
    counts = [draw(st.integers(low, 2)) for low in (0, 1, 1, 1)]
    groups, start = [], 0
    for count in counts:
        groups.append(labels[start : start + count])
        start += count
    batch, rows, columns, sums = groups
    left, right, out = (
        "".join(draw(st.permutations(part)))
        for part in (batch + rows + sums, batch + sums + columns, batch + rows + columns)
    )
    return f"{left},{right}->{out}", {label: draw(st.integers(1, 3)) for label in labels[:start]}


@settings(max_examples=100, deadline=None)
@given(equations())
def test_any_product_is_torchs(case: tuple[str, dict[str, int]]) -> None:
    equation, sizes = case
    assert why_no_product(equation) == ""
    labels = Labels.of(equation)
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn([sizes[label] for label in side], generator=generator, dtype=torch.float64)
        for side in (labels.left, labels.right)
    )
    a, b = left_matrices(x, equation), right_matrices(y, equation)
    assert a.dim() == b.dim() == 3
    found = from_matrices(a @ b, x, y, equation)
    torch.testing.assert_close(found, torch.einsum(equation, x, y))


def test_groups_of_an_equation() -> None:
    labels = Labels.of("bqhd, bkhd -> bhqk")
    assert (labels.batch, labels.rows, labels.columns, labels.sums) == ("bh", "q", "k", "d")
    assert Labels.of("ij,jk").out == "ik"


@pytest.mark.parametrize("equation", ["ab,bc,cd->ad", "bij,bjk,kl->lbi", "ab,bc,ca", "ab,cd,bc,de->ea", "ab,b,bc->ac"])
@pytest.mark.parametrize("is_reversed", [False, True])
def test_more_operands_are_taken_two_at_a_time(
    equation: str, is_reversed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of torch, and in that of a path, from the right to the left."""
    terms = equation.partition("->")[0].split(",")
    sizes = dict(zip("abcdeijkl", range(2, 11)))
    operands = [torch.randn([sizes[label] for label in term], dtype=torch.float64) for term in terms]
    if is_reversed:
        path = [(len(terms) - 2 - step, len(terms) - 1 - step) for step in range(len(terms) - 1)]
        finder = SimpleNamespace(contract_path=lambda *_, **__: (path, None))
        torchs = {"enabled": True, "is_available": lambda: True, "get_opt_einsum": lambda: finder, "strategy": "auto"}
        monkeypatch.setattr(torch.backends, "opt_einsum", SimpleNamespace(**torchs))
    waiting = [*operands]
    found = einsum.pairs(equation, [x.shape for x in operands])
    for i, j, pair in found:
        left, right = waiting[i], waiting.pop(j)
        waiting[i] = torch.einsum(pair, left, right)
    monkeypatch.undo()
    assert next((i, j) for i, j, _ in found) == ((len(terms) - 2, len(terms) - 1) if is_reversed else (0, 1))
    torch.testing.assert_close(waiting[0], torch.einsum(equation, *operands))
