"""Side effects: what code did beside returning, as the interpreter's audit events tell it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ACTS = (
    "os.",
    "shutil.",
    "subprocess.",
    "socket.",
    "ctypes.",
    "urllib.",
    "tempfile.",
    "signal.",
    "pty.",
    "builtins.input",
)
_ONLY_LOOKS = {"os.listdir", "os.scandir", "os.walk"}

_records: list[list[str]] = []
_is_hooked = False


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _records:
        return
    if event == "open":
        mode, flags = args[1], args[2]
        is_write = bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if not is_write:
            return
    elif event == "import":
        if args[0] in sys.modules:
            return
    elif event in _ONLY_LOOKS or not event.startswith((*_ACTS, "exec")):
        return
    _records[-1].append(f"{event} {args!r:.200}")


@contextmanager
def recorded_side_effects() -> Iterator[list[str]]:
    """Processes started, files written, moved or removed, sockets, code that is executed, modules imported."""
    global _is_hooked
    if not _is_hooked:
        sys.addaudithook(_hook)  # cannot be taken away again
        _is_hooked = True
    _records.append([])
    try:
        yield _records[-1]
    finally:
        _records.pop()
