"""Accumulator width: how much of the variance of a dot product an accumulator of m bits keeps, against VRR's theorem.

Products have 5 bits of fraction, as those of two 1-5-2 numbers; the accumulator has 8 bits of exponent, so that its
fraction alone matters. The measured knee is the narrowest accumulator that passes the paper's test, ln v = n (1 - VRR)
< ln 50, with the measured ratio for VRR.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from launch.reproduction.experiment import Form, Result
from launch.reproduction.plots import figure, table
from passes.analysis.vrr import MAX_LOG_LOSS, min_accumulator, vrr
from runtime import gemm
from runtime.numerics import quantize
from runtime.numerics.specs import Rounding

TITLE = "Accumulator width"

_M_P = 5
_WIDTHS = range(3, 13)
_LENGTHS = {"smallest": (256,), "short": (256, 1024, 4096), "full": (256, 1024, 4096, 16384)}
_TRIALS = {"smallest": 200, "short": 1000, "full": 4000}
_CHUNK = 64
_SUMS: dict[str, tuple[Rounding, int | None]] = {
    "nearest": ("nearest_even", None), "truncated": ("toward_zero", None), "chunked": ("nearest_even", _CHUNK),
}  # fmt: skip


def units(form: Form) -> list[str]:
    return [f"length-{length}_m{width:02d}" for length in _LENGTHS[form] for width in _WIDTHS]


def measure(key: str, form: Form) -> Result:
    """Variance of the narrow sums over that of the true ones, of nearest, truncating and chunked sums."""
    length, width = (int(part.lstrip("lengthm-")) for part in key.split("_"))
    generator = torch.Generator().manual_seed(length)
    trials = _TRIALS[form]
    x_MK = quantize(torch.randn(trials, length, generator=generator), f"1-8-{_M_P}")
    ones_K1 = torch.ones(length, 1)
    true_M = x_MK.double().sum(dim=1)
    found: Result = {"length": length, "width": width, "vrr": vrr(width, _M_P, length),
                     "vrr_chunked": vrr(width, _M_P, length, _CHUNK)}  # fmt: skip
    for name, (rounding, chunk) in _SUMS.items():
        sums_M = gemm(
            x_MK, ones_K1, a_format="fp32", b_format="fp32", accumulate=f"1-8-{width}", chunk=chunk, rounding=rounding
        )[:, 0].double()
        found[name] = (sums_M.square().sum() / true_M.square().sum()).item()
        found[f"{name}_error"] = ((sums_M - true_M).square().sum() / true_M.square().sum()).item()
    return found


def tell(results: Mapping[str, Result], form: Form, plots: Path) -> str:
    by_length: dict[int, list[Result]] = {}
    for each in results.values():
        by_length.setdefault(each["length"], []).append(each)
    with figure(plots / "accumulator-width.png", columns=2, width=11) as (left, right):
        for color, (length, found) in enumerate(by_length.items()):
            widths = [each["width"] for each in found]
            left.plot(widths, [each["vrr"] for each in found], "--", color=f"C{color}", label=f"VRR, {length}")
            left.plot(widths, [each["nearest"] for each in found], ".-", color=f"C{color}", label=f"nearest, {length}")
            left.plot(widths, [each["truncated"] for each in found], ":", color=f"C{color}", label=f"cut, {length}")
            right.plot(widths, [each["nearest_error"] for each in found], ".-", color=f"C{color}", label=f"{length}")
            right.plot(widths, [each["chunked_error"] for each in found], "--", color=f"C{color}",
                       label=f"{length}, chunk {_CHUNK}")  # fmt: skip
        left.set(xlabel="bits of fraction", ylabel="variance kept")
        right.set(xlabel="bits of fraction", ylabel="squared error / variance", yscale="log")
        for axes in (left, right):
            axes.legend(fontsize=6)
    rows, lines = [], []
    for length, found in by_length.items():
        predicted, knee = min_accumulator(_M_P, length), _knee(found, "nearest")
        chunked, chunked_knee = min_accumulator(_M_P, length, _CHUNK), _knee(found, "chunked")
        rows.append([f"{length}", f"{predicted}", _shown(knee), f"{chunked}", _shown(chunked_knee),
                     _shown(_knee(found, "truncated"))])  # fmt: skip
        if knee is not None:
            verdict = "reproduced" if abs(knee - predicted) <= 2 else "contradicted"
            lines.append(f"- Length {length}: the knee of a nearest sum is within 2 bits of VRR's: **{verdict}**")
    head = ["length", "VRR's knee", "nearest", f"VRR's, chunk {_CHUNK}", "chunked", "cut"]
    below = min(_WIDTHS)
    return (
        f"Narrowest accumulator, in bits of fraction, for which n (1 - variance kept) < ln 50; {_M_P} bits of fraction"
        f" in a product, {_TRIALS[form]} sums each; widths of {below} to {max(_WIDTHS)} were run, so {below} means that"
        " or fewer. The theorem speaks of sums rounded to nearest and is pessimistic by up to two bits; a sum that is cut"
        " off keeps far less than it says.\n\n"
        f"{table(head, rows)}\n\n" + "\n".join(lines) + f"\n\n![width]({plots.name}/accumulator-width.png)"
    )


def _knee(found: list[Result], name: str) -> int | None:
    """The narrowest from which on every wider one passes; None if the widest does not."""
    knee = None
    for each in sorted(found, key=lambda one: -int(one["width"])):
        if each["length"] * abs(1 - each[name]) >= MAX_LOG_LOSS + _noise(each["length"]):
            return knee
        knee = int(each["width"])
    return knee


def _noise(length: int) -> float:
    """What a ratio of 1 may be off by in so many trials is paired with the true sums and falls out; rounding stays."""
    return math.sqrt(length) * 0.01


def _shown(knee: int | None) -> str:
    return "> " + str(max(_WIDTHS)) if knee is None else str(knee)
