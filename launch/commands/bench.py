"""Bench: list and run the modules of benchmarks/. Each prints ratios to what a user would run instead."""

import ast
import subprocess
import sys
from pathlib import Path

from launch.training.config import ConfigError
from lpcompile.errors import did_you_mean, nearest_names

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def find_benchmarks(folder: Path = FOLDER) -> dict[str, str]:
    """Name -> what it measures, from the first line of its docstring."""
    return {
        file.stem: (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        for file in sorted(folder.glob("*.py"))
        if not file.stem.startswith("_")
    }


def run_benchmarks(name: str | None, arguments: list[str], folder: Path = FOLDER) -> int:
    """Run one benchmark, or all of them in the order of their names; the first exit code that is not 0, or 0."""
    known = find_benchmarks(folder)
    if not known:
        raise ConfigError(
            "there are no benchmarks", where=str(folder), hint="a checkout of the project, which holds them"
        )
    if name is not None and name not in known:
        raise ConfigError(did_you_mean(f'"{name}" is not a benchmark', nearest_names(name, tuple(known))))
    for each in [name] if name else list(known):
        print(f"== {each}: {known[each]}", flush=True)
        command = [sys.executable, "-m", f"{folder.name}.{each}", *arguments]
        if code := subprocess.run(command, cwd=folder.parent, check=False).returncode:
            return code
    return 0
