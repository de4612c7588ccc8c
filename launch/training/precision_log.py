"""Precision log: telemetry of a run, on the first rank: TensorBoard as it goes, and at the end three files and a table.

telemetry.json   all numbers        telemetry.html   the page with plots        suggested.yaml   a policy that mends
policy.yaml      the policy that ran, which suggested.yaml extends, if it is not a shipped one
"""

import math
from pathlib import Path
from typing import Any

from torch import nn

from launch.training.precision_options import PrecisionOptions
from lpcompile import Policy, telemetry
from lpcompile.errors import LpError
from lpcompile.policy.file import load_policy, shipped_policies
from lpcompile.watching.results import step_result
from lpcompile.watching.watcher import SMALLEST_EXPONENT

HEAD_ROWS = 8
"""Of the table that is printed."""


class PrecisionLog:
    """Looks at the model from now on. `board`: TensorBoard's writer."""

    def __init__(self, model: nn.Module, options: PrecisionOptions, policy: Policy, folder: Path, board: Any) -> None:
        self._policy, self._folder, self._board, self._num_told = policy, folder, board, 0
        self._session = telemetry(
            model, options.every, sample=options.sample, counterfactuals=options.counterfactuals
        )  # fmt: skip

    def write(self) -> None:
        """Tell TensorBoard of a step that was looked at, once it is over; under the number that its loss has."""
        records = self._session.records
        if len(records) == self._num_told:
            return
        self._num_told = len(records)
        result = step_result(records[-1])
        done = result.step + 1
        for (site, role, operand), sqnr in result.sqnr_db.items():
            at = (site, role, operand)
            values = {"sqnr_db": sqnr, "amax": result.largest[at], "underflow": result.underflow[at],
                      "overflow": result.overflow[at]}  # fmt: skip
            for name, value in values.items():
                if value is not None and math.isfinite(value):
                    self._board.add_scalar(f"precision/{site}/{role}_{operand}/{name}", value, done)
        for (site, tensor), counts in result.exponents.items():
            self._tell_exponents(f"precision/{site}/{tensor}/log2", counts, done)

    def _tell_exponents(self, name: str, counts: list[int], step: int) -> None:
        """How many elements have which exponent of two, as a histogram."""
        held = [i for i, count in enumerate(counts) if count]
        if not held:
            return
        first, last = held[0], held[-1]
        numbers = counts[first : last + 1]
        places = [i + SMALLEST_EXPONENT for i in range(first, last + 1)]
        self._board.add_histogram_raw(
            name, min=places[0], max=places[-1] + 1, num=sum(numbers),
            sum=sum(n * place for n, place in zip(numbers, places)),
            sum_squares=sum(n * place * place for n, place in zip(numbers, places)),
            bucket_limits=[place + 1 for place in places], bucket_counts=numbers, global_step=step,
        )  # fmt: skip

    def close(self) -> list[str]:
        """Write the files; the lines to print."""
        session = self._session
        session.close()
        try:
            (self._folder / "telemetry.json").write_text(session.to_json() + "\n", encoding="utf-8")
        except LpError as error:  # no step was looked at: a resumed run may be too short
            return [f"telemetry: {error}"]
        session.to_html(self._folder / "telemetry.html")
        suggested = session.suggest(self._extended())
        (self._folder / "suggested.yaml").write_text(suggested, encoding="utf-8")
        mends = session.suggestion().mends
        layers = list(dict.fromkeys(mend.gemm.site for mend in mends))
        named = f"rules for {', '.join(layers[:3])}{', ...' if len(layers) > 3 else ''}" if layers else "no rule to add"
        return [*session.to_text(HEAD_ROWS).splitlines(), f"telemetry.html has the plots; suggested.yaml: {named}"]

    def _extended(self) -> str:
        """How suggested.yaml names the policy that ran."""
        if self._policy.name in shipped_policies() and load_policy(self._policy.name).hash == self._policy.hash:
            return self._policy.name
        (self._folder / "policy.yaml").write_text(self._policy.to_yaml(), encoding="utf-8")
        return "policy.yaml"
