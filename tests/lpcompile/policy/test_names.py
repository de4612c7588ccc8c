"""Names of policies: folders and tables are called by them, so no path, no control character, no novel."""

import pytest

from lpcompile.errors import PolicyError
from lpcompile.policy.resolve import Policy


@pytest.mark.parametrize(
    "name", ["a/b", "../../x", "/etc/x", "a\\b", "a\0b", "a\nb", "\ud800", "", "x" * 101, "x" * 5000, "\x1b[31m"]
)
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(PolicyError, match=r"is not a name\. Expected 1 to 100 printable characters"):
        Policy(name=name)


@pytest.mark.parametrize("name", ["hfp8", "hfp8 of 2019", "größer", "a.b-c_d", "x" * 100])
def test_a_name_is_a_name(name: str) -> None:
    assert Policy(name=name).name == name
