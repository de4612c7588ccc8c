"""Swamping: sums of numbers of mean 1 and deviation 1 in narrow accumulators, against length and chunk size.

The figure of the FP8 paper (Wang et al., NeurIPS 2018): a plain sum in 16 bits leaves the true one once it is 2^m times
its terms, one in chunks or with stochastic rounding follows it. Terms are uniform on 1 +- sqrt 3, in fp32.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from launch.reproduction.experiment import Form, Result
from launch.reproduction.plots import figure, table
from runtime import gemm
from runtime.numerics.specs import Rounding

TITLE = "Swamping"

_TRIALS = 32
_LARGEST = {"smallest": 10, "short": 14, "full": 17}  # log2 of the longest sum
_SUMS: dict[str, tuple[str, Rounding, int | None]] = {  # accumulator, rounding, chunk
    "1-6-9": ("1-6-9", "nearest_even", None),
    "1-6-9, chunk 32": ("1-6-9", "nearest_even", 32),
    "1-6-9, chunk 64": ("1-6-9", "nearest_even", 64),
    "1-6-9, chunk 256": ("1-6-9", "nearest_even", 256),
    "1-6-9, stochastic": ("1-6-9", "stochastic", None),
    "DLFloat16 (ties away)": ("dlfloat16", "nearest_away", None),
    "bf16": ("bf16", "nearest_even", None),
    "bf16, chunk 64": ("bf16", "nearest_even", 64),
    "fp32": ("fp32", "nearest_even", None),
}  # fmt: skip


def units(form: Form) -> list[str]:
    return [f"length-{2**power}" for power in range(6, _LARGEST[form] + 1)]


def measure(key: str, form: Form) -> Result:
    """Of each accumulator the mean of sum / true sum over the trials, and the root mean square of its error."""
    length = int(key.partition("-")[2])
    generator = torch.Generator().manual_seed(length)
    x_MK = (torch.rand(_TRIALS, length, generator=generator) * 2 - 1) * 3**0.5 + 1
    ones_K1, true_M = torch.ones(length, 1), x_MK.double().sum(dim=1)
    found: Result = {}
    for name, (accumulate, rounding, chunk) in _SUMS.items():
        sums_M = gemm(
            x_MK, ones_K1, a_format="fp32", b_format="fp32", accumulate=accumulate, chunk=chunk, rounding=rounding
        )[:, 0].double()
        share_M = sums_M / true_M
        found[name] = {"share": share_M.mean().item(), "error": (share_M - 1).square().mean().sqrt().item()}
    return found


def tell(results: Mapping[str, Result], form: Form, plots: Path) -> str:
    lengths = {int(key.partition("-")[2]): each for key, each in results.items()}
    with figure(plots / "swamping.png") as axes:
        for name in _SUMS:
            style = "--" if "chunk" in name else "-"
            axes.plot(list(lengths), [each[name]["share"] for each in lengths.values()], style, marker=".", label=name)
        axes.set(xscale="log", xlabel="terms of the sum", ylabel="sum / true sum", ylim=(0, 1.25))
        axes.legend(fontsize=7)
    shown = [length for length in lengths if length in (256, 1024, 4096, 16384, 131072)]
    rows = [
        [name, *(f"{lengths[length][name]['share']:.4f} ({lengths[length][name]['error']:.1e})" for length in shown)]
        for name in _SUMS
    ]
    stall = next((each for length, each in lengths.items() if length == 4096), None)
    verdicts = "" if stall is None else _verdicts(stall)
    return (
        f"Mean over {_TRIALS} sums of sum / true sum, and in brackets the root mean square of its relative error; terms"
        " are uniform on 1 +- sqrt 3. Published (FP8-2018, figure of section 2.3, from memory): in 16 bits with 9 bits"
        f" of fraction a plain sum stalls at a length of about 4096, chunks of 32 to 256 do not.\n\n"
        f"{table(['accumulator', *map(str, shown)], rows)}\n\n{verdicts}![swamping]({plots.name}/swamping.png)"
    )


def _verdicts(at_4096: Result) -> str:
    chunk, plain, stochastic = (at_4096[name]["error"] for name in ("1-6-9, chunk 64", "1-6-9", "1-6-9, stochastic"))
    stalled = at_4096["bf16"]["share"]
    return "\n".join([
        f"- Chunks of 64 are more exact than a plain sum of 4096 in 1-6-9 ({chunk:.1e} and {plain:.1e}):"
        f" **{'reproduced' if chunk < plain else 'contradicted'}**",
        f"- A plain sum in bf16 stalls before 4096 (it holds {100 * stalled:.0f} % of the true one):"
        f" **{'reproduced' if stalled < 0.5 else 'contradicted'}**",
        f"- Stochastic rounding without chunks follows the true sum ({stochastic:.1e}):"
        f" **{'reproduced' if stochastic < plain else 'contradicted'}**",
        "", "",
    ])  # fmt: skip
