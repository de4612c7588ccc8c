"""Scales fill formats; sums of what they fill must not leave their accumulator."""

import pytest
import torch
from torch import Tensor, nn

from lpcompile import Policy, lpcompile, report
from passes.analysis.room import why_no_room
from runtime.numerics.specs import AccumulateSpec, GemmSpec, QuantSpec

REFUSED = [
    ("bf16", "fp32"),
    ("tf32", "fp32"),
    ("fp32", "fp32"),
    ("e4m3", "fp16"),
    ("e5m2", "fp16"),
    ("fp16", "dlfloat16"),
]
RUN = [("e4m3", "fp32"), ("e5m2", "fp32"), ("fp16", "fp32"), ("dlfloat16", "fp32"), ("int8", "int32"),
       ("e4m3", "1-6-9"), ("e4m3", "bf16"), ("int4", "fp16")]  # fmt: skip


def _policy(format: str, accumulate: str) -> Policy:
    cast = {"format": format, "scale": {"granularity": "row"}}
    rule = {"match": {}, "fwd": {"x": cast, "w": cast, "accumulate": accumulate}}
    return Policy.model_validate({"version": 1, "name": "p", "rules": [rule]})


def _results(format: str, accumulate: str) -> tuple[Tensor, Tensor, str]:
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 32), torch.randn(64, 256)
    exact = layer(x)
    model = lpcompile(layer, _policy(format, accumulate))
    reasons = [row.reason for row in report(model).gemms if row.role == "fwd" and not row.runs_as_policy_says]
    return exact.detach(), model(x).detach(), "".join(reasons)


@pytest.mark.parametrize(("format", "accumulate"), REFUSED)
@pytest.mark.filterwarnings("ignore::runtime.errors.LpWarning")
def test_what_has_no_room_is_refused_with_the_way_out(format: str, accumulate: str) -> None:
    """They gave Inf everywhere, or an error of 0.74 to 0.9999, under a certificate."""
    exact, y, reason = _results(format, accumulate)
    assert f"scales fill {format}, and a sum has no room" in reason
    assert reason.endswith("range is that of fp32" if accumulate == "fp32" else "use accumulate: fp32, or no scale")
    assert torch.equal(y, exact)


@pytest.mark.parametrize(("format", "accumulate"), RUN)
def test_what_has_room_runs(format: str, accumulate: str) -> None:
    exact, y, reason = _results(format, accumulate)
    assert not reason
    assert float((y - exact).norm() / exact.norm()) < 0.2


def test_the_length_of_the_sum_counts_where_it_is_known() -> None:
    spec = GemmSpec(*[QuantSpec.parse("e4m3 nearest_even tensor/amax")] * 2, AccumulateSpec("1-6-9"))
    assert why_no_room("grad", spec, 10**8) == ""
    assert "1000000000" in why_no_room("grad", spec, 2 * 10**9).replace("2000000000", "1000000000")
    bare = GemmSpec(*[QuantSpec.parse("bf16")] * 2)
    assert why_no_room("fwd", bare, 10**6) == ""
