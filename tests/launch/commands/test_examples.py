"""Examples: every command line that a help text shows is one that the command line takes."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from launch.cli import command_line
from launch.commands.bench import find_benchmarks

ROOT = Path(__file__).resolve().parents[3]
_VERBS = "train|opt|policy|inspect|bench|reproduce"
_COMMAND = re.compile(rf"(?:\blpcompile|-m launch) ((?:{_VERBS})(?: [^|#`>\n]*)?)(?=[|#`>\n]|$)")


def _texts() -> dict[str, str]:
    """Help texts by verb, and the pages that show commands."""
    texts: dict[str, str] = {}

    def walk(name: str, command: object) -> None:
        texts[name] = f"{getattr(command, 'help', '') or ''}\n{getattr(command, 'epilog', '') or ''}"
        for verb, each in getattr(command, "commands", {}).items():
            walk(f"{name} {verb}", each)

    walk("lpcompile", get_command(command_line()))
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return texts | {str(page.relative_to(ROOT)): page.read_text() for page in pages}


def _commands() -> list[str]:
    found = [match[1].strip() for text in _texts().values() for match in _COMMAND.finditer(text)]
    return sorted({re.sub(r" {2,}.*", "", each).rstrip(".,;)") for each in found})


def test_there_are_examples() -> None:
    assert len(_commands()) > 20


@pytest.mark.parametrize("line", _commands())
def test_the_command_line_takes_every_example(line: str) -> None:
    """Parsed by the command that it names: an option or an argument that does not exist raises."""
    words, command = shlex.split(line), get_command(command_line())
    context = command.make_context("lpcompile", list(words), resilient_parsing=True)
    while hasattr(command, "commands"):
        name = words.pop(0)
        assert name in command.commands, line
        command = command.commands[name]
    context = command.make_context(name, list(words), parent=context)
    if name == "bench" and context.params.get("name"):
        assert context.params["name"] in find_benchmarks(), line
        source = (ROOT / "benchmarks" / f"{context.params['name']}.py").read_text()
        for option in (each for each in context.params["arguments"] or [] if each.startswith("--")):
            assert f'"{option}"' in source, line
