"""Range casts: what a cast to a range format gives, from a cast to integers.

    ptq   low = min(x, 0), high = max(x, 0);  z = floor(-low B / (high - low)), at least 1 where low < 0
          s = max(-low / z, high / (B - z));  value = s clamp(round(x / s), -z, B - z)
    psq   of each sample: s = (max - min) / B;  value = s round((x - min) / s) + min
    bhq   value = T^-1 psq(T x),  T = reflect(scale(x)) over groups of samples

B = 2^bits - 1; a sample is x[i], and of a vector there is one. All is fp32 (float64 for float64 x), the reflections
float64. With stochastic rounding E[value] = x. Where a range holds Inf or NaN, all of it is NaN. The 1e-8 by which the
authors' code widens ranges is left out: gradients may be smaller; and z >= 1 where that code divides by zero.

bhq, by the authors' code: samples are sorted by range v_0 >= v_1 >= ...; the G largest, for the least number N - G of
others such that each gets more than one, lead a group, and the others are shared among them as v_i. In a group of m,
with l1 the leader's range and l2 the largest of the others': w1 = l1 / sqrt(m), w2 = l2 max|Q|, scales
s1 ~ w1^(-1/3) and s2 ~ (w2 / (m - 1))^(-1/3), and Q = 1 - 2 u u^T, u ~ 1 / sqrt(m) - e_leader, which turns the leader
into a constant vector: its range is spread over the group, and the noise of the others falls with it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.numerics.range_formats import RangeFormat
from runtime.numerics.specs import QuantSpec, Rounding, ScaleSpec

IntegerCast = Callable[[Tensor, QuantSpec, Tensor], Tensor]
"""(x, spec, scale) -> x / scale rounded to the integers of the spec, fp32, or float64 for float64 x."""


@torch.no_grad()
def values_in_range(x: Tensor, row: RangeFormat, rounding: Rounding, cast: IntegerCast) -> Tensor:
    """The values that the head of this file defines, in x's shape: fp32, or float64 for float64 x."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if not x.numel():
        return wide
    samples = wide.reshape(x.shape[0] if x.dim() > 1 else 1, -1)
    if row.kind == "ptq":
        values = _per_tensor(samples, row, rounding, cast)
    elif row.kind == "psq":
        values = _per_sample(samples, row, rounding, cast)
    else:
        groups = _groups(samples)
        values = _per_sample(samples if groups is None else groups.mix(samples), row, rounding, cast)
        values = values if groups is None else groups.unmix(values)
    return values.reshape(x.shape)


def _per_tensor(x: Tensor, row: RangeFormat, rounding: Rounding, cast: IntegerCast) -> Tensor:
    low, high = (end.double() for end in torch.aminmax(x))
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    zero = torch.floor(-low * row.steps / (high - low)).nan_to_num(0.0)
    zero = torch.where(low < 0, zero.clamp(min=1.0), 0.0)
    sides = torch.stack([-low / zero, high / (row.steps - zero)]).nan_to_num(0.0, posinf=math.inf)
    scale = sides.amax() + 0.0 * (low + high)  # NaN where an end is no number
    scale = torch.where(scale == 0, 1.0, scale).to(x.dtype)
    grid = cast(x, QuantSpec("int16", rounding, ScaleSpec("tensor")), scale)
    return grid.clamp_(-zero, row.steps - zero) * scale


def _per_sample(x: Tensor, row: RangeFormat, rounding: Rounding, cast: IntegerCast) -> Tensor:
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    scale = (high - low) / row.steps
    scale = torch.where(scale == 0, 1.0, scale)
    grid = cast(x - low, QuantSpec(f"uint{row.bits}", rounding, ScaleSpec("row")), scale)
    return grid * scale + low


class _Groups(NamedTuple):
    """Which group each sample is in, and what it is multiplied by."""

    group: Tensor
    """(N,), int64."""
    direction: Tensor
    """u, (N, 1), float64: of each group a unit vector."""
    scale: Tensor
    """(N, 1), float64."""
    num_groups: int

    def mix(self, x: Tensor) -> Tensor:
        """T x."""
        return self._reflect(x.double() * self.scale).to(x.dtype)

    def unmix(self, y: Tensor) -> Tensor:
        """T^-1 y."""
        return (self._reflect(y.double()) / self.scale).to(y.dtype)

    def _reflect(self, x: Tensor) -> Tensor:
        """Q x, of which Q is the inverse."""
        along = x.new_zeros(self.num_groups, x.shape[1]).index_add_(0, self.group, x * self.direction)
        return x - 2 * self.direction * along[self.group]


def _groups(x: Tensor) -> _Groups | None:
    """None where nothing is to be mixed: one sample, ranges that are all 0, or one that is no number."""
    low, high = torch.aminmax(x.double(), dim=1)
    ranges = high - low
    if x.shape[0] < 2 or not bool(ranges.isfinite().all()) or not bool((ranges > 0).any()):
        return None
    order = torch.sort(ranges, descending=True, stable=True).indices.tolist()
    v = ranges[order].tolist()
    num_leaders = _num_leaders(v)
    num_others = len(v) - num_leaders
    group, direction, scale = [0] * len(v), [0.0] * len(v), [1.0] * len(v)
    total, shared, begin = sum(v[:num_leaders]), 0.0, num_leaders
    for i in range(num_leaders):
        shared += num_others * v[i] / total
        end = len(v) if i == num_leaders - 1 else num_leaders + round(shared)
        m = end - begin + 1
        u = _direction(m)
        s1, s2 = _scales(v[i], v[begin] if m > 1 else 0.0, m)
        for place, is_leader in ((i, True), *((place, False) for place in range(begin, end))):
            row = order[place]
            group[row], direction[row], scale[row] = i, u[not is_leader], s1 if is_leader else s2
        begin = end

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=x.device)[:, None]

    return _Groups(torch.tensor(group, device=x.device), column(direction), column(scale), num_leaders)


def _num_leaders(v: list[float]) -> int:
    """G: from all but one downward, till the leader of the smallest range gets more than one of the others."""
    total = sum(v)
    for num_others in range(1, len(v) - 1):
        total -= v[len(v) - num_others]
        if num_others * v[len(v) - num_others - 1] > total:
            return len(v) - num_others
    return 1


def _direction(m: int) -> tuple[float, float]:
    """Of u the leader's entry and the others'."""
    if m == 1:
        return 0.0, 0.0
    length = math.sqrt(2 - 2 / math.sqrt(m))
    return (1 / math.sqrt(m) - 1) / length, 1 / math.sqrt(m) / length


def _scales(l1: float, l2: float, m: int) -> tuple[float, float]:
    """s1 and s2, with 1 / s1^2 + 1 / s2^2 = 1 as in the authors' code; the others of range 0 take the leader's."""
    if m == 1:
        return 1.0, 1.0
    between = 1 / (m - math.sqrt(m))  # of Q, two of the others
    w1, w2 = l1 / math.sqrt(m), l2 * max(1 / math.sqrt(m), abs(1 - between), between if m > 2 else 0.0)
    if w2 == 0 or w1 == 0:
        return 1.0, 1.0
    s1, s2 = w1 ** (-1 / 3), (w2 / (m - 1)) ** (-1 / 3)
    c = math.sqrt(1 / s1**2 + 1 / s2**2)
    return s1 * c, s2 * c
