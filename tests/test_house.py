"""The house: floors, optional libraries in one file each, faces that export what the design names, the example."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("launch", "lpcompile", "passes", "runtime")
SOURCES = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


def test_imports_point_downward() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "KEPT" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stdout


def test_deepspeed_and_triton_are_imported_in_one_place() -> None:
    assert {path.parent for path in SOURCES if _imports(path, "triton")} <= {ROOT / "runtime/kernels/triton"}
    assert [path for path in SOURCES if _imports(path, "deepspeed")] == []  # imported by name, in functions
    attaching = (ROOT / "runtime/collectives/attach").glob("*.py")
    assert [path.name for path in attaching if "import_module" in path.read_text()] == ["deepspeed_library.py"]
    assert [path.name for path in SOURCES if 'import_module("deepspeed' in path.read_text()] == []


def _imports(path: Path, names: str) -> bool:
    return re.search(rf"^\s*(import|from) ({names})\b", path.read_text(), re.MULTILINE) is not None


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed_and_listed(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()
    assert f'"{package}*"' in (ROOT / "pyproject.toml").read_text()


def test_faces_export_what_the_design_names() -> None:
    import lpcompile
    import runtime.collectives
    import runtime.numerics

    assert set(lpcompile.__all__) >= {"Policy", "advance", "attach", "load_policy", "lpcompile", "report", "LpError"}
    assert set(runtime.collectives.__all__) == {"all_reduce", "reduce_scatter"}
    assert set(runtime.numerics.__all__) == {
        "FORMATS", "decode", "decode_blocks", "encode", "encode_blocks", "get_format", "quantize"
    }  # fmt: skip


def test_the_example_runs() -> None:
    command = [sys.executable, str(ROOT / "examples" / "own_loop.py")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(value) for value in re.findall(r"loss (\S+)", done.stdout)]
    assert losses[-1] < 0.5 * losses[0]
    assert "9 of 9 named GEMMs run so" in done.stdout
