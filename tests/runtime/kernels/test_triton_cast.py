"""The Triton cast: its tests run in a process of their own, as triton reads TRITON_INTERPRET when imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.kernels.triton import has_triton

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/runtime/kernels/triton_interpreted.py"],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_the_package_is_importable_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import runtime.kernels.triton, runtime.kernels.cast.grid"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
