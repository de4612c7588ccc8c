"""`lpcompile inspect`: what a user reads about formats and numbers, and how a mistake is told."""

import pytest

from launch.cli import run
from launch.commands.inspect import inspect_value, parse_number, split_names
from runtime.errors import FormatError
from runtime.numerics.block_formats import BLOCK_FORMATS
from runtime.numerics.formats import FORMATS


def read(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    """The words of each line on stdout."""
    assert run(["inspect", *arguments]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["inspect", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_formats_lists_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    lines = read(capsys, "formats")
    first = [line[0] for line in lines if line]
    assert set(first) >= {*FORMATS, *BLOCK_FORMATS}
    e4m3 = next(line for line in lines if line and line[0] == "e4m3")
    assert e4m3[1:10] == ["1-4-3", "7", "448", "2^-6", "2^-9", "254", "2^-3", "NaN", "nearest_even"]
    assert e4m3[-1] == "e4m3fn"


def test_value_shows_code_value_error_and_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    lines = read(capsys, "value", "0.3", "--format", "e4m3,dlfloat16,nvfp4")
    assert lines[0] == ["x", "=", "0.3"]
    assert " ".join(lines[2]) == "e4m3 nearest_even 0 0101 010 0.3125 +0.0125 +4.1667% 0.28125 0.3125"
    assert " ".join(lines[3][:6]) == "dlfloat16 nearest_away 0 011101 001100110 0.2998046875"
    assert " ".join(lines[4][:8]) == "nvfp4 nearest_even 0 11 1 | 0 1111"


def test_value_takes_negative_numbers_options_and_roundings(capsys: pytest.CaptureFixture[str]) -> None:
    lines = read(capsys, "value", "-1.0625", "--format", "1-4-3:bias=11,top=none", "--format", "e4m3")
    assert [line[0] for line in lines[2:]] == ["1-4-3:bias=11,top=none", "e4m3"]
    assert [(line[5], line[-1]) for line in lines[2:]] == [("-1", "tie")] * 2
    assert read(capsys, "value", "-1.0625", "--format", "e4m3", "--rounding", "nearest_away")[2][5] == "-1.125"
    assert len(read(capsys, "value", "2^-10")) > 6  # formats of its own choice


@pytest.mark.parametrize(
    ("x", "name", "value", "below", "above", "note"),
    [
        (0.3, "e4m3", 0.3125, 0.28125, 0.3125, ""),
        (0.5, "e4m3", 0.5, 0.5, 0.5, "exact"),
        (464.0, "e4m3", 448, 448, None, "beyond the last value, rounds to it"),
        (465.0, "e4m3", 448, 448, None, "overflow: saturates"),
        (float("-inf"), "e5m2", -57344, None, -57344, "overflow: saturates"),
        (2.0**-10, "e4m3", 0, 0, 2.0**-9, "tie; underflow to 0"),
        (2.0**-9, "e4m3", 2.0**-9, 2.0**-9, 2.0**-9, "exact; subnormal"),
        (2.5, "fp4-radix4", 4, 1, 4, "tie"),
        (-0.2, "nf4", -0.18477343022823334, -0.28444138169288635, -0.18477343022823334, ""),
        (-3.0, "uint8", 0, None, 0, "overflow: saturates"),
        (3.5, "mxfp4", 3, 3, None, "scale 2^-1; overflow: saturates"),
        (3.5, "mxfp4:scale=rceil", 4, 3, 4, "scale 1; tie"),
        (0.0, "nvfp4", 0, 0, 0, "scale 0 / 1"),
        (6.0, "nvfp4", 6, 6, 6, "scale 448 / 448; exact"),
        (1.98, "mxint8", 1.984375, 1.96875, 1.984375, "scale 1"),
    ],
)
def test_what_a_number_becomes(
    x: float, name: str, value: float, below: float | None, above: float | None, note: str
) -> None:
    found = inspect_value(x, name)
    assert (found.value, found.below, found.above, found.note) == (value, below, above, note)


def test_nan_and_odds() -> None:
    assert inspect_value(float("nan"), "e4m3-fnuz").code == "1 0000 000"
    assert inspect_value(float("nan"), "int8").note == "NaN has no code"
    assert inspect_value(float("nan"), "mxfp4").code == "0 00 0 | 11111111"
    assert inspect_value(0.3, "e4m3", "stochastic").note == "above with probability 0.6"
    drawn = {inspect_value(0.3, "e4m3", "stochastic", seed).value for seed in range(20)}
    assert drawn == {0.28125, 0.3125}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0.3", 0.3),
        ("-1e-6", -1e-6),
        ("2^-10", 2.0**-10),
        ("-2^3", -8),
        ("-1.5*2^-9", -1.5 * 2.0**-9),
        ("1/3", 1 / 3),
        ("0x1.8p3", 12),
        ("-inf", float("-inf")),
    ],
)
def test_numbers_as_people_write_them(text: str, number: float) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize("text", ["", "three", "2^", "1/0", "2^99999", "0x", "1..2", "^3"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(FormatError, match=r"is not a number\. Expected one as 0\.3"):
        parse_number(text)


def test_names_are_split_at_commas_that_part_names() -> None:
    assert split_names(["e4m3,1-4-3:bias=11,top=none,nvfp4", "int8"]) == [
        "e4m3",
        "1-4-3:bias=11,top=none",
        "nvfp4",
        "int8",
    ]


def test_a_mistake_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert '"e4m4" is not a number format' in refuse(capsys, "value", "1", "--format", "e4m3,e4m4")
    assert '--rounding: "up" is not a rounding' in refuse(capsys, "value", "1", "--rounding", "up")
    assert '"x" is not a number' in refuse(capsys, "value", "x")
    assert "int1 has no value" in refuse(capsys, "value", "1", "--format", "int1", "--rounding", "toward_zero")
    assert "is not an option of mxfp4" in refuse(capsys, "value", "1", "--format", "mxfp4:scale=mean")
    assert "graph" in refuse(capsys, "graph")


@pytest.mark.parametrize("verb", ["formats", "value"])
def test_help_has_examples(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert run(["inspect", verb, "--help"]) == 0
    assert f"lpcompile inspect {verb}" in " ".join(capsys.readouterr().out.split())
