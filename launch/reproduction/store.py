"""Store: the results that are there, one JSON file a unit, written aside and renamed: after a kill a rerun goes on.

DIR/FORM/EXPERIMENT/KEY.json
"""

import json
import os
from pathlib import Path

from launch.reproduction.experiment import Result
from launch.training.config import ConfigError


class Store:
    """The results of one experiment in one form."""

    def __init__(self, out: Path, form: str, name: str) -> None:
        self._folder = out / form / name
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or "it cannot be made"
            raise ConfigError("results cannot be kept here", where=f"--out {out}", got=reason) from None

    def load(self, key: str) -> Result | None:
        """What was measured; None for what was not, and for a file that does not read."""
        try:
            found: Result = json.loads((self._folder / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def save(self, key: str, result: Result) -> None:
        """Whole or not at all. OSError of a full disk is the caller's."""
        aside = self._folder / f"{key}.json.{os.getpid()}.tmp"
        aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, self._folder / f"{key}.json")
