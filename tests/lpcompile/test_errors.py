"""The error kinds of the front door are one family, and read as sentences."""

import pytest

from lpcompile import errors
from runtime import errors as runtime_errors


@pytest.mark.parametrize("kind", [errors.PolicyError, errors.ParseError, errors.LoweringError])
def test_every_kind_is_an_lp_error(kind: type[errors.LpError]) -> None:
    assert issubclass(kind, runtime_errors.LpError)
    assert str(kind("what", where="a.yaml:3", expected="x", got="y", hint="z")) == (
        "a.yaml:3: what. Expected x. Got y. Try z."
    )


@pytest.mark.parametrize("name", ["FormatError", "LpError", "NotSupported", "PassError", "VerifyError", "WireError"])
def test_kinds_of_the_ground_floor_are_the_same_classes(name: str) -> None:
    assert getattr(errors, name) is getattr(runtime_errors, name)


def test_did_you_mean_asks_only_when_a_name_is_near() -> None:
    near = errors.nearest_names("e4m4", ("bf16", "e4m3"))
    far = errors.nearest_names("zzz", ("bf16", "e4m3"))
    assert errors.did_you_mean('"e4m4" is no format', near) == (
        '"e4m4" is no format. Did you mean "e4m3"? Known: bf16, e4m3'
    )
    assert errors.did_you_mean('"zzz" is no format', far) == '"zzz" is no format. Known: bf16, e4m3'
