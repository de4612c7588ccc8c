"""Grouping: the sites of equal layers as one name.

model.layers.0.mlp.up_proj ... model.layers.31.mlp.up_proj      model.layers.{0..31}.mlp.up_proj
h.0.fc, h.1.fc, h.3.fc                                          h.{0,1,3}.fc
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod

_Numbers = tuple[int, ...]
_Box = tuple[frozenset[int], ...]


def fold_names(names: Iterable[str]) -> list[tuple[str, int]]:
    """(name with the numbers of its path folded, how many it stands for), in the order of the first of each.

    Every name is in exactly one of them, and none stands for a name that is not there.
    """
    shapes: dict[tuple[str | None, ...], set[_Numbers]] = defaultdict(set)
    for name in names:
        parts = name.split(".")
        numbers = tuple(int(part) for part in parts if _is_number(part))
        shapes[tuple(None if _is_number(part) else part for part in parts)].add(numbers)
    folded = []
    for shape, numbers_of in shapes.items():
        for box in _boxes(numbers_of, shape.count(None)):
            sets = iter(box)
            text = ".".join(_print_set(next(sets)) if part is None else part for part in shape)
            folded.append((text, prod(map(len, box))))
    return folded


def _is_number(part: str) -> bool:
    """Whether a part of a path is a number as Python prints it: `07` is a name."""
    return part.isascii() and part.isdecimal() and str(int(part)) == part


def _boxes(points: set[_Numbers], num_axes: int) -> list[_Box]:
    """Points as products of sets: what differs in the last number alone is one, then what differs in the one before."""
    boxes: list[_Box] = [tuple(frozenset({number}) for number in point) for point in sorted(points)]
    for axis in reversed(range(num_axes)):
        merged: dict[tuple[_Box, _Box], set[int]] = defaultdict(set)
        for box in boxes:
            merged[box[:axis], box[axis + 1 :]] |= box[axis]
        boxes = [(*before, frozenset(numbers), *after) for (before, after), numbers in merged.items()]
    return boxes


def _print_set(numbers: frozenset[int]) -> str:
    if len(numbers) == 1:
        return str(*numbers)
    return "{" + ",".join(_print_run(run) for run in _runs(sorted(numbers))) + "}"


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Consecutive numbers together."""
    runs = [[numbers[0]]]
    for before, number in pairwise(numbers):
        if number == before + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def _print_run(run: Sequence[int]) -> str:
    return f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run))
