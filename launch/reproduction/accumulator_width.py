"""Accumulator width: how much of the variance of a dot product an accumulator of m bits keeps, against VRR's theorem.

Products have 5 bits of fraction, as those of two 1-5-2 numbers; the accumulator has 8 bits of exponent, so that its
fraction alone matters. The measured knee is the narrowest accumulator that passes the paper's test, ln v = n (1 - VRR)
< ln 50, with the measured ratio for VRR.

Then training: the sums of GRAD alone, whose length is batch times height times width, in such accumulators.
"""

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from launch.reproduction.experiment import Form, Result
from launch.reproduction.plots import figure, table
from launch.reproduction.statistics import paired
from launch.reproduction.training import image_config, train
from launch.training.images.packaged import is_installed
from lpcompile import load_policy
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


_SEEDS = {"smallest": 0, "short": 1, "full": 5}
_STEPS = {"smallest": 0, "short": 60, "full": 200}
_TRAINED = {"smallest": (), "short": (1, 3, 6, 9), "full": (1, 2, 3, 4, 5, 6, 7, 9, 12)}
_CHUNKS = (None, _CHUNK)
_LENGTH = 32 * 8 * 8
"""Of GRAD's sums in the first stage of a ResNet on digits of 8 x 8, at a batch of 32."""


def units(form: Form) -> list[str]:
    sums = [f"length-{length}_m{width:02d}" for length in _LENGTHS[form] for width in _WIDTHS]
    seeds = range(_SEEDS[form] if is_installed("digits") else 0)
    narrow = [f"m{width:02d}{'' if chunk is None else '-chunked'}" for width in _TRAINED[form] for chunk in _CHUNKS]
    return sums + [f"train_{name}_seed{seed:02d}" for seed in seeds for name in ("wide", *narrow)]


def measure(key: str, form: Form) -> Result:
    """Variance of the narrow sums over that of the true ones, of nearest, truncating and chunked sums."""
    if key.startswith("train_"):
        _, name, seed = key.split("_")
        return _train(name, seed, form)
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
        gained_M, true = sums_M.square() - true_M.square(), true_M.square().mean()
        found[name] = (1 + gained_M.mean() / true).item()
        found[f"{name}_deviation"] = (gained_M.std() / true / math.sqrt(trials)).item()
        found[f"{name}_error"] = ((sums_M - true_M).square().sum() / true_M.square().sum()).item()
    return found


def _train(name: str, seed: str, form: Form) -> Result:
    """GRAD's operands in 1-5-2 with a loss scale of 1024, its sums in fp32 (wide) or 1-8-m; all else in fp32."""
    accumulate = "fp32"
    if name != "wide":
        chunk = f", chunk: {_CHUNK}" if name.endswith("-chunked") else ""
        accumulate = f"{{format: 1-8-{int(name[1:3])}, rounding: nearest_even{chunk}}}"
    operands = f"dy: fp8-152, x: fp8-152, accumulate: {accumulate}"
    text = f"rules: [{{grad: {{{operands}}}}}]\nloss_scale: {{kind: static, init: 1024}}\n"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.yaml"
        path.write_text(text)
        policy = load_policy(path)
    return train(image_config("resnet", "digits", seed=int(seed.removeprefix("seed")), steps=_STEPS[form]), policy)


def tell(results: Mapping[str, Result], form: Form, plots: Path) -> str:
    sums = [each for each in results.values() if "length" in each]
    trained = {key: each for key, each in results.items() if key.startswith("train_")}
    parts = [_told_sums(sums, form, plots)] if sums else []
    return "\n\n".join([*parts, _told_training(trained, form, plots)] if trained else parts)


def _told_training(results: Mapping[str, Result], form: Form, plots: Path) -> str:
    rows, shown = [], {chunk: dict[int, float]() for chunk in _CHUNKS}
    for width in _TRAINED[form]:
        cells = [f"{width}", f"{vrr(width, _M_P, _LENGTH):.3f}"]
        for chunk in _CHUNKS:
            name = f"m{width:02d}{'' if chunk is None else '-chunked'}"
            pairs = [
                (100 * each["accuracy"], 100 * results[f"train_wide_{key.split('_')[2]}"]["accuracy"])
                for key, each in results.items()
                if key.startswith(f"train_{name}_") and f"train_wide_{key.split('_')[2]}" in results
            ]
            found = paired([one for one, _ in pairs], [two for _, two in pairs])
            shown[chunk][width] = found.mean
            interval = f", {found.low:+.2f} to {found.high:+.2f}" if found.count > 1 else ""
            cells.append(f"{found.mean:+.2f}{interval} ({found.count})" if found.count else "not run yet")
        rows.append(cells)
    with figure(plots / "accumulator-width-training.png") as axes:
        for chunk, points in shown.items():
            label = "no chunks" if chunk is None else f"chunks of {chunk}"
            axes.plot(list(points), list(points.values()), ".-", label=label)
            predicted = min_accumulator(_M_P, _LENGTH, chunk)
            axes.axvline(predicted, linestyle=":", color="C0" if chunk is None else "C1", label=f"VRR, {label}")
        axes.set(xlabel="bits of fraction of GRAD's sums", ylabel="points of accuracy beside fp32 sums")
        axes.legend(fontsize=7)
    plain, chunked = (min_accumulator(_M_P, _LENGTH, chunk) for chunk in _CHUNKS)
    head = ["bits of fraction", "VRR", "no chunks", f"chunks of {_CHUNK}"]
    return (
        f"Training the ResNet of `accuracy` on digits, {_STEPS[form]} steps: points of"
        f" accuracy beside fp32 sums where GRAD's sums (up to {_LENGTH} products of 1-5-2 numbers) are narrow, with the"
        " 95% interval and the number of paired seeds."
        f" VRR asks for {plain} bits, or {chunked} in chunks of {_CHUNK}.\n\n{table(head, rows)}\n\n"
        f"![training]({plots.name}/accumulator-width-training.png)"
    )


def _told_sums(results: list[Result], form: Form, plots: Path) -> str:
    by_length: dict[int, list[Result]] = {}
    for each in results:
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
        for what, found_knee, should in (("", knee, predicted), (f" in chunks of {_CHUNK}", chunked_knee, chunked)):
            if found_knee is not None:
                comes_to = "reproduced" if abs(found_knee - should) <= 2 else "contradicted"
                lines.append(
                    f"- Length {length}: the knee of a nearest sum{what} is within 2 bits of VRR's: **{comes_to}**"
                )
    head = ["length", "VRR's knee", "nearest", f"VRR's, chunk {_CHUNK}", "chunked", "cut"]
    below = min(_WIDTHS)
    return (
        f"Narrowest accumulator, in bits of fraction, for which n (1 - variance kept) < ln 50; {_M_P} bits of fraction"
        f" in a product, {_TRIALS[form]} sums each; widths of {below} to {max(_WIDTHS)} were run, so {below} means that"
        " or fewer. The theorem speaks of sums rounded to nearest and is pessimistic by up to two bits; a sum that is"
        " cut off keeps far less than it says.\n\n"
        f"{table(head, rows)}\n\n" + "\n".join(lines) + f"\n\n![width]({plots.name}/accumulator-width.png)"
    )


def _knee(found: list[Result], name: str) -> int | None:
    """The narrowest from which on every wider one passes, within two standard errors; None if the widest does not."""
    knee = None
    for each in sorted(found, key=lambda one: -int(one["width"])):
        surely_lost = max(0.0, abs(1 - each[name]) - 2 * each[f"{name}_deviation"])
        if each["length"] * surely_lost >= MAX_LOG_LOSS:
            return knee
        knee = int(each["width"])
    return knee


def _shown(knee: int | None) -> str:
    return "> " + str(max(_WIDTHS)) if knee is None else str(knee)
