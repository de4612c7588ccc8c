"""The keys of `accumulate`: what they mean, how they print, what is refused and where."""

from pathlib import Path

import pytest

from lpcompile import Policy, load_policy
from lpcompile.errors import PolicyError
from lpcompile.policy.file import policy_schema
from runtime.numerics.specs import AccumulateSpec

PLAN = "{format: 1-6-9, chunk: 64, rounding: stochastic, product: rounded, model: per_chunk}"

ALIGNED = "{format: fp32, chunk: 16, rounding: toward_zero, model: aligned, align: 25}"


def _load(folder: Path, accumulate: str, operands: str = "x: e4m3, w: e4m3") -> Policy:
    path = folder / "policy.yaml"
    path.write_text(f"rules:\n  - match: {{op: linear}}\n    fwd: {{{operands}, accumulate: {accumulate}}}\n")
    return load_policy(path)


@pytest.mark.parametrize(
    ("text", "operands", "spec"),
    [
        ("1-6-9", "x: e4m3", "1-6-9"),
        ("{format: 1-6-9, chunk: 64}", "x: e4m3", "1-6-9/64"),
        (PLAN, "x: e4m3, w: e5m2", "1-6-9/64 stochastic rounded per_chunk"),
        ("{format: dlfloat16, rounding: nearest_away}", "x: e4m3", "dlfloat16"),
        ("{rounding: toward_zero}", "x: e4m3", "fp32 toward_zero"),
        ("int16", "x: int8, w: int8", "int16"),
        ("hopper-fp8", "x: e4m3, w: e5m2", "hopper-fp8"),
        ("{format: Ampere_BF16}", "x: bf16, w: bf16", "fp32/8 toward_zero aligned[24]"),
        (ALIGNED, "x: fp16, w: bf16", "fp32/16 toward_zero aligned[25]"),
        ("{format: int16, chunk: 32, overflow: wrap}", "x: int8, w: int4", "int16/32 wrap"),
    ],
)
def test_what_the_keys_mean(tmp_path: Path, text: str, operands: str, spec: str) -> None:
    policy = _load(tmp_path, text, operands)
    table = policy.rules[0].fwd
    assert table is not None
    assert table.spec().accumulator == AccumulateSpec.parse(spec)
    (tmp_path / "again.yaml").write_text(policy.to_yaml())
    again = load_policy(tmp_path / "again.yaml").rules[0].fwd
    assert again is not None
    assert again.spec() == table.spec()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "{format: 1-6-9, rounding: stochastc}",
            '3: rules[0].fwd.accumulate.rounding: "stochastc" is not a rounding. Did you mean "stochastic"?',
        ),
        ("{format: 1-6-9, product: fused}", '3: rules[0].fwd.accumulate.product: "fused" is not a product'),
        ("{format: 1-6-9, model: chunk}", '3: rules[0].fwd.accumulate.model: "chunk" is not a model'),
        ("{format: 1-6-9, overflow: wrapp}", '3: rules[0].fwd.accumulate.overflow: "wrapp" is not a rule of overflow'),
        ("{format: 1-6-9, overflow: wrap}", "3: rules[0].fwd.accumulate: 1-6-9 saturates. Got overflow wrap."),
        ("{format: int32, rounding: stochastic}", "3: rules[0].fwd.accumulate: integers add exactly."),
        ("{format: 1-6-9, chunk: 0}", "3: rules[0].fwd.accumulate.chunk: not a value this key takes."),
        ("{format: 1-6-9, chunks: 64}", '3: rules[0].fwd.accumulate.chunks: "chunks" is not a key here.'),
        (
            "{format: hopper-fp8, chunk: 64}",
            "3: rules[0].fwd.accumulate: hopper-fp8 says all of an accumulator. Got also chunk.",
        ),
        ("{format: 1-6-9, align: 9}", "3: rules[0].fwd.accumulate: only aligned sums are aligned."),
        ("{model: aligned, chunk: 8}", "3: rules[0].fwd.accumulate: no aligned sum. Expected rounding toward_zero."),
        ("{format: fp32, model: aligned, align: 29}", "3: rules[0].fwd.accumulate.align: not a value this key takes."),
        ("nf4", "3: rules[0].fwd.accumulate: nf4 cannot hold a sum."),
        ("int16", "3: rules[0].fwd.accumulate: int16 sums need two integer operands. Got x: e4m3 and w: e4m3."),
    ],
)
def test_errors_name_the_line(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(PolicyError) as error:
        _load(tmp_path, text)
    assert sentence in str(error.value)


def test_the_schema_knows_the_keys() -> None:
    section = next(part for part in policy_schema()["$defs"]["Accumulate"]["anyOf"] if "properties" in part)
    assert set(section["properties"]) == {"format", "chunk", "rounding", "product", "model", "overflow", "align"}
    text = str(section["properties"])
    assert all(word in text for word in ("stochastic", "rounded", "per_chunk", "wrap"))
