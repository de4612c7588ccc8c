"""Build: compile a C++ file of this folder at first use, keep the shared object for the user, load it.

    source and header text + flags + compiler version + CPU features  --sha256-->  CACHE/lpcompile/<stem>-<hash>.so

CACHE is $XDG_CACHE_HOME or ~/.cache. A file lock lets one process compile while others wait, and the object appears by
an atomic rename, so a reader never sees half of it. Nothing is compiled when this module is imported.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

COMPILERS = ("g++", "c++", "clang++")
# -fno-trapping-math: comparisons become vector selects; -ffp-contract=off: a * b + c stays two roundings, as in torch
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)
TIMEOUT_SECONDS = 300


@lru_cache(maxsize=64)
def load_library(source: Path) -> ctypes.CDLL | None:
    """The shared object compiled from `source`; None, after one warning that says what is missing, if there is none."""
    try:
        return ctypes.CDLL(str(_built(source)))
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) and error.stderr else str(error)
        warnings.warn(
            f"{source.name}: the C++ kernel could not be built ({said[-500:]}); the pure-torch path serves, with equal "
            f"bits and slower. Install g++ with OpenMP and have a writable {_cache_folder()} to get it back.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _built(source: Path) -> Path:
    """The path of the shared object, compiled now if no earlier process has."""
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise OSError(f"no C++ compiler: looked for {', '.join(COMPILERS)}")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    headers = (header.read_text() for header in sorted(source.parent.glob("*.h")))
    facts = "\n".join((source.read_text(), *headers, *FLAGS, compiler, version, _cpu_features()))
    target = _cache_folder() / f"{source.stem}-{hashlib.sha256(facts.encode()).hexdigest()[:24]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                fresh = Path(folder) / target.name
                command = [compiler, *FLAGS, "-o", str(fresh), str(source)]
                subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_SECONDS)
                os.replace(fresh, target)
    return target


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lpcompile"


def _cpu_features() -> str:
    """What -march=native depends on: a home shared by unlike machines must not share objects."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
