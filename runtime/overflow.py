"""Overflow: which layer and role a value went beyond its format first, since it was last asked.

note(beyond, site, role)     in the order in which they happen; beyond: bool, or bool () of a device
first()                      "SITE ROLE" of the first that is True; waits for a device only here
"""

from collections.abc import Mapping

from torch import Tensor


class FirstOverflow:
    """Notes in order, one a site and role."""

    def __init__(self) -> None:
        self._noted: dict[tuple[str, str], bool | Tensor] = {}

    def note(self, beyond: bool | Tensor, site: str, role: str) -> None:
        """Of one cast, or one gradient."""
        if beyond is False:
            return
        place, before = (site, role), self._noted.get((site, role))
        if before is None or beyond is True:
            self._noted[place] = beyond
        elif before is not True:
            self._noted[place] = before | beyond

    def first(self) -> str:
        """ "" where nothing overflowed."""
        return next((f"{site or '(root)'} {role}" for (site, role), beyond in self._noted.items() if bool(beyond)), "")

    def clear(self) -> None:
        """Ask anew from here on."""
        self._noted = {}

    @property
    def noted(self) -> Mapping[tuple[str, str], bool | Tensor]:
        return self._noted
