"""Experiment: a claim, the pieces it is measured in, and what is said of them.

    units(form) -> keys    measure(key, form) -> numbers as JSON    tell(results, form, folder) -> a section of the page

A unit is what is lost if the process dies; units are independent, and a key says all about one within its form.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

Form = Literal["smallest", "short", "full"]
"""smallest: seconds, to see that it runs. short: minutes on 2 cores. full: hours."""
FORMS: tuple[Form, ...] = get_args(Form)

Result = dict[str, Any]


class Experiment(Protocol):
    """A module of this package is one: it has a TITLE and these three functions."""

    TITLE: str

    def units(self, form: Form) -> list[str]:
        """Keys, in the order in which they are best measured: those that make a comparison whole stand together."""

    def measure(self, key: str, form: Form) -> Result:
        """One unit. The same key and form give the same numbers, but for times."""

    def tell(self, results: Mapping[str, Result], form: Form, plots: Path) -> str:
        """The section of the page, in Markdown, from the units that are there; its plots go into `plots`."""
