"""Last words: what a worker that ends early leaves for whoever started it, and the one sentence that is made of them.

A worker writes them into the file that torchrun sets aside; a failure that only follows from another rank's is marked,
so that the rank that began it is the one that is named.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.errors import LpError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FEW_BYTES = 1 << 20
_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe", "socket closed", "read error")
_TIMEOUT = ("timed out", "timeout")


class WorkerError(LpError):
    """A worker ended with an error of its own; `exit_code` is what the command should end with."""

    def __init__(self, what: str, exit_code: int = 1, **parts: str) -> None:
        super().__init__(what, **parts)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[Any, ...]:
        return LpError.__new__, (type(self), *self.args), vars(self)


def told(error: BaseException, folder: Path | str = "") -> LpError | None:
    """The sentence of an error that a machine causes and no code: a disk that is full, a file that is not writable.
    None for another error.
    """
    where = str(getattr(error, "filename", None) or folder)
    hint = "making room, then lpcompile train --resume with the run's folder, if it has a checkpoint"
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno in _FULL:
            return WorkerError("the disk is full", where=where, got=os.strerror(error.errno), hint=hint)
        return WorkerError("this cannot be read or written", where=where, got=os.strerror(error.errno))
    is_writer = isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("PytorchStreamWriter", "unexpected pos", "write failed", "open file failed")
    )
    if is_writer:
        free = shutil.disk_usage(folder or ".").free
        if free < _FEW_BYTES or os.strerror(errno.ENOSPC) in str(error):
            return WorkerError("the disk is full", where=where, got=os.strerror(errno.ENOSPC), hint=hint)
        got = f"{free / 1e6:,.0f} MB free, and from torch: {str(error).partition(chr(10))[0][-80:]}"
        return WorkerError("a file cannot be written", where=where, got=got, hint=hint)
    return None


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says no more than that another rank went away."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _PEER)


def is_timeout(error: BaseException) -> bool:
    """Whether an error says that a collective waited in vain."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _TIMEOUT)


def leave_last_words(error: BaseException, exit_code: int = 2, follows: bool = False) -> None:
    """Hand a worker's error to the agent that started it. follows: it is only what another rank's failure led to."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or Path(path).exists():  # the first words count
        return
    sentence = str(error) if isinstance(error, LpError) else f"{type(error).__name__}: {error}".partition("\n")[0]
    words = {"message": sentence, "is_sentence": isinstance(error, LpError), "exit_code": exit_code}
    words |= {"follows": follows, "time": time.time()}
    extra = {"py_callstack": "", "timestamp": str(int(time.time()))}
    Path(path).write_text(json.dumps({"message": {**words, "extraInfo": extra}}))


def first_cause(failures: Mapping[int, Any], folder: Path) -> WorkerError:
    """One sentence of what torchrun says of the workers that failed, by rank: the first that began it."""
    hint = resume_hint(folder)
    spoken = [(rank, each.message) for rank, each in failures.items() if isinstance(each.message, dict)]
    spoken.sort(key=lambda each: float(each[1].get("time", 0)))
    for rank, words in spoken:
        if not words.get("follows"):
            sentence, code = str(words["message"]).rstrip("."), int(words.get("exit_code", 2))
            if words.get("is_sentence"):
                return WorkerError(sentence, code)
            return WorkerError(f"worker {rank} failed: {sentence}", code, where=str(folder), hint=hint)
    silent = [(rank, each) for rank, each in failures.items() if not isinstance(each.message, dict)]
    for rank, each in silent or list(failures.items()):
        cause = f"signal {each.signal_name()}" if each.exitcode < 0 else f"exit code {each.exitcode}"
        return WorkerError(f"worker {rank} was lost ({cause})", 1, where=str(folder), hint=hint)
    return WorkerError("the workers were lost", 1, where=str(folder), hint=hint)


def resume_hint(folder: Path) -> str:
    """How to go on with a run that ended early."""
    if (folder / "checkpoints" / "latest").is_file():
        return f"lpcompile train --resume {folder}"
    return ""
