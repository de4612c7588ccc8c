"""What is imported when: torch's compiler only where something is compiled, torch only where a tensor is met."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from launch.cli import _APART, command_line

ROOT = Path(__file__).resolve().parents[2]
SLOW = ("torch._dynamo", "torch._inductor", "triton", "transformers", "deepspeed", "tensorboard", "matplotlib")


def loaded(code: str, names: tuple[str, ...]) -> str:
    """Which of `names` a new process has imported after `code`; with a comma between two."""
    command = f"{code}\nimport sys\nprint('LOADED', ','.join(each for each in {names} if each in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.rpartition("LOADED")[2].strip()


@pytest.mark.parametrize("arguments", [["--help"], ["policy", "list"], ["policy", "show", "hfp8"], ["train", "--help"]])
def test_what_meets_no_tensor_needs_no_torch(arguments: list[str]) -> None:
    assert loaded(f"from launch.cli import run\nrun({arguments})", ("torch", *SLOW)) == ""


@pytest.mark.parametrize(
    "code",
    [
        "import lpcompile",
        "from lpcompile import *",
        "from runtime import gemm\nfrom runtime.numerics import quantize\nfrom runtime.collectives import all_reduce",
    ],
)
def test_our_names_import_no_compiler(code: str) -> None:
    assert loaded(code, SLOW) == ""


def test_a_verb_that_is_not_asked_for_is_described_as_when_it_is() -> None:
    whole, apart = get_command(command_line()), get_command(command_line(""))
    assert set(whole.commands) == set(apart.commands)  # type: ignore[attr-defined]
    for name in _APART:
        described = apart.commands[name].help  # type: ignore[attr-defined]
        assert whole.commands[name].help.partition("\n")[0] == described, name  # type: ignore[attr-defined]
