"""Names of other systems: each is the row that is meant, in any case, or is refused with what it may mean; a hint is
never a format of another width, and never another role.
"""

import re
from typing import Any

import pytest

from lpcompile.errors import LpError
from lpcompile.policy.names import nearest_format
from lpcompile.policy.resolve import Policy
from runtime.numerics.block_formats import BLOCK_FORMATS
from runtime.numerics.formats import BLOCK_NAMES, FORMATS, get_format


def policy(**rule: Any) -> Policy:
    return Policy.model_validate({"rules": [rule]})


def refusal(**rule: Any) -> str:
    with pytest.raises(LpError) as caught:
        policy(**rule)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "row"),
    [
        *((name, "e4m3") for name in ("e4m3fn", "float8_e4m3fn", "torch.float8_e4m3fn", "FLOAT8E4M3FN", "fp8_e4m3")),
        *((name, "e4m3") for name in ("E4M3", "kFloat8E4M3", "f8E4M3FN")),
        *((name, "e5m2") for name in ("float8_e5m2", "torch.float8_e5m2", "FLOAT8E5M2", "fp8-e5m2")),
        ("torch.float8_e4m3fnuz", "e4m3-fnuz"),
        ("e5m2fnuz", "e5m2-fnuz"),
        *((name, "bf16") for name in ("bfloat16", "torch.bfloat16", "BF16", "BFloat16")),
        *((name, "fp16") for name in ("float16", "torch.float16", "half", "FP16")),
        *((name, "fp32") for name in ("float32", "torch.float32", "float", "FP32")),
        ("TF32", "tf32"),
        ("mxfp8-e4m3", "mxfp8"),
        ("MXFP8_E5M2", "mxfp8-e5m2"),
        ("mxfp6_e3m2", "mxfp6-e3m2"),
        ("NVFP4", "nvfp4"),
        ("fp6_e3m2", "e3m2"),
        ("torch.float4_e2m1fn_x2", "e2m1"),
        ("NF4", "nf4"),
        ("INT4", "int4"),
        ("torch.int8", "int8"),
        ("UINT8", "uint8"),
        ("torch.float8_e8m0fnu", "e8m0"),
    ],
)
def test_a_format_of_another_system(given: str, row: str) -> None:
    one = policy(fwd={"x": given})
    assert one == policy(fwd={"x": row})
    assert f"x: {row}" in one.to_yaml()


@pytest.mark.parametrize("row", [*FORMATS, *BLOCK_FORMATS, "1-6-9:bias=31,top=none", "int5", "uint8:zero=128"])
def test_every_row_is_itself_in_any_case(row: str) -> None:
    for given in (row, row.upper(), row.replace("-", "_") if row in FORMATS else row):
        assert policy(fwd={"x": given}).rules[0].fwd.x.format == row  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("given", "meanings"),
    [
        ("FP8", ["e4m3", "e5m2"]),
        ("fp6", ["e2m3", "e3m2"]),
        ("fp4", ["e2m1", "nvfp4"]),
        ("float64", ["fp32"]),
        ("int4_g128", ["format: int4", "granularity: block", "block: [1, 128]"]),
    ],
)
def test_a_name_of_several_formats_is_refused_with_each(given: str, meanings: list[str]) -> None:
    told = refusal(fwd={"x": given})
    assert "is not the name of one format" in told
    assert all(meaning in told for meaning in meanings)
    assert "Did you mean" not in told


def _bits(name: str) -> int | None:
    if found := re.match(r"(?:torch\.)?(?:mx|nv|b|dl|u|h)*(?:float|fp|int|f)-?([0-9]+)", name.lower()):
        return int(found[1])
    return None


@pytest.mark.parametrize("stem", ["fp", "float", "bf", "int", "mxfp", "tf", "hfp"])
@pytest.mark.parametrize("bits", [2, 4, 6, 8, 16, 32, 64])
@pytest.mark.parametrize("tail", ["", "x", "_e4m3fx", "_e5m2_"])
def test_a_hint_is_never_another_width(stem: str, bits: int, tail: str) -> None:
    name = f"{stem}{bits}{tail}"
    hint = nearest_format(name)
    if not hint.startswith('"'):
        return
    guess = hint.split('"')[1]
    width = BLOCK_FORMATS[guess].element if guess in BLOCK_NAMES else guess
    assert _bits(name) in (None, get_format(width).bits) or _bits(name) == _bits(guess)


@pytest.mark.parametrize(
    ("given", "guess"),
    [("e4m4", "e4m3"), ("e5m3", "e5m2"), ("mxpf8", None), ("bfloat61", None), ("hfp8-134", "hfp8-143")],
)
def test_a_typing_error_has_a_hint(given: str, guess: str | None) -> None:
    assert (f'Did you mean "{guess}"' in refusal(fwd={"x": given})) is (guess is not None)


@pytest.mark.parametrize(
    ("spelling", "role"),
    [
        *((name, "fwd") for name in ("fprop", "FWD", "forward", "Fprop")),
        *((name, "bwd") for name in ("dgrad", "grad_input", "BWD", "DGRAD")),
        *((name, "grad") for name in ("wgrad", "grad_weight", "GRAD")),
    ],
)
def test_a_role_of_another_system(spelling: str, role: str) -> None:
    assert policy(**{spelling: {}}) == policy(**{role: {}})


@pytest.mark.parametrize(
    ("role", "spelling", "operand"),
    [
        ("fwd", "input", "x"),
        ("fwd", "activation", "x"),
        ("fwd", "weight", "w"),
        ("fwd", "W", "w"),
        ("bwd", "dout", "dy"),
        ("bwd", "grad_output", "dy"),
        ("grad", "grad_output", "dy"),
        ("grad", "input", "x"),
    ],
)
def test_an_operand_of_another_system(role: str, spelling: str, operand: str) -> None:
    assert policy(**{role: {spelling: "e4m3"}}) == policy(**{role: {operand: "e4m3"}})


def test_no_role_and_no_operand_is_guessed() -> None:
    assert "Did you mean" not in refusal(backward={})
    assert "bwd (dgrad, dx = dy.w)" in refusal(backward={})
    assert "Did you mean" not in refusal(fwd={"inptu": "e4m3"})
    assert "Did you mean" not in refusal(bwd={"outp": "e4m3"})
    assert 'Did you mean "accumulate"' in refusal(fwd={"acumulate": "fp32"})


def test_one_operand_under_two_names_is_refused() -> None:
    assert '"weight" and "w" name the same operand' in refusal(fwd={"w": "e4m3", "weight": "e5m2"})


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"granularity": "per_token"}, {"granularity": "row"}),
        ({"granularity": "token"}, {"granularity": "row"}),
        ({"granularity": "per_channel"}, {"granularity": "channel"}),
        ({"granularity": "per_group", "block": [1, 32]}, {"granularity": "block", "block": [1, 32]}),
        ({"granularity": "Group"}, {"granularity": "block"}),
        ({"granularity": "tensorwise"}, {"granularity": "tensor"}),
        ({"rule": "dynamic"}, {"rule": "amax"}),
    ],
)
def test_a_scale_of_another_system(given: dict[str, Any], meant: dict[str, Any]) -> None:
    (one, other) = (policy(fwd={"w": {"format": "int8", "scale": scale}}) for scale in (given, meant))
    assert one == other


@pytest.mark.parametrize(
    ("given", "meant"), [("sr", "stochastic"), ("rne", "nearest_even"), ("RTZ", "toward_zero"), ("SR", "stochastic")]
)
def test_a_rounding_of_another_system(given: str, meant: str) -> None:
    (one, other) = (policy(fwd={"x": {"format": "e4m3", "rounding": rounding}}) for rounding in (given, meant))
    assert one == other


@pytest.mark.parametrize(
    ("given", "op"),
    [("Conv1D", "linear"), ("Conv1d", "conv1d"), ("Conv2d", "conv2d"), ("Linear", "linear"), ("bmm", "matmul")],
)
def test_an_op_of_another_system(given: str, op: str) -> None:
    assert policy(match={"op": given}, fwd={}) == policy(match={"op": op}, fwd={})


def test_embedding_is_no_op() -> None:
    assert '"embedding" is not an op' in refusal(match={"op": "embedding"}, fwd={})


@pytest.mark.parametrize("block", [[128], 128])
def test_a_block_of_one_number_says_what_to_write(block: Any) -> None:
    told = refusal(fwd={"w": {"format": "int4", "scale": {"granularity": "block", "block": block}}})
    assert "Try block: [1, 128] for groups of 128" in told
    told = refusal(fwd={"w": {"format": "int4", "scale": {"granularity": "block", "group_size": 128}}})
    assert "granularity: block, block: [1, 128]" in told


def test_a_channel_is_of_a_weight() -> None:
    told = refusal(fwd={"x": {"format": "int8", "scale": {"granularity": "per_channel"}}})
    assert "granularity channel is for weights" in told
    assert "row (one scale per token)" in told
