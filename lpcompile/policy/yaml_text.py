"""YAML as policies are written: one line where a table is short, no anchors."""

from typing import Any

import yaml


def dump(values: dict[str, Any]) -> str:
    """A mapping as a file; what is Inline in it is on one line."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=1_000_000)


def inline_table(table: dict[str, Any]) -> dict[str, Any]:
    """On one line if every operand is a bare name, else a line per operand."""
    if not any(isinstance(value, dict) for value in table.values()):
        return Inline(table)
    return {key: Inline(value) if isinstance(value, dict) else value for key, value in table.items()}


class Inline(dict[str, Any]):
    """A mapping printed on one line."""


class _Dumper(yaml.SafeDumper):
    """Plain YAML, with Inline mappings on one line and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    Inline, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data.items(), flow_style=True)
)
