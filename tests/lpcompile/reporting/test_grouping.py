"""Names fold into ranges, and every name comes back out of them."""

import itertools
import re

from hypothesis import given
from hypothesis import strategies as st

from lpcompile.reporting.grouping import fold_names


def test_ranges_lists_and_what_is_no_number() -> None:
    assert fold_names([f"layers.{i}.fc" for i in range(32)]) == [("layers.{0..31}.fc", 32)]
    assert fold_names(["h.0", "h.1", "h.3"]) == [("h.{0,1,3}", 3)]
    assert fold_names(["h.07", "h.7", "head"]) == [("h.07", 1), ("h.7", 1), ("head", 1)]
    assert fold_names([]) == []


def test_two_numbers_fold_where_they_are_a_product() -> None:
    names = [f"m.{i}.e.{j}" for i in range(3) for j in range(4)]
    assert fold_names(names) == [("m.{0..2}.e.{0..3}", 12)]
    assert fold_names(names[:-1]) == [("m.{0,1}.e.{0..3}", 8), ("m.2.e.{0..2}", 3)]


@given(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=30))
def test_every_name_is_in_exactly_one(points: set[tuple[int, int]]) -> None:
    names = [f"a.{i}.b.{j}.c" for i, j in sorted(points)]
    folded = fold_names(names)
    assert sorted(itertools.chain.from_iterable(_unfold(name) for name, _ in folded)) == sorted(names)
    assert [len(_unfold(name)) for name, _ in folded] == [count for _, count in folded]


def _unfold(name: str) -> list[str]:
    parts = re.split(r"\{(.*?)\}", name)
    choices = [_numbers(part) if place % 2 else [part] for place, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def _numbers(text: str) -> list[str]:
    found: list[str] = []
    for run in text.split(","):
        first, _, last = run.partition("..")
        found += map(str, range(int(first), int(last or first) + 1))
    return found
