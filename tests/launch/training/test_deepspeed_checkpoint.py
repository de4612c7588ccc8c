"""A DeepSpeed checkpoint of somebody else's runs nothing when it is loaded."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.collectives.attach.deepspeed import load_checkpoint, save_checkpoint


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class _Engine:
    """Loads as DeepSpeed's engine does, without a restriction of its own."""

    def load_checkpoint(self, folder: str, tag: str) -> Any:
        return folder, torch.load(Path(folder) / tag / "mp_rank_00_model_states.pt", weights_only=False)


def test_what_a_disk_refuses_one_rank_is_raised_once_all_are_through() -> None:
    """Raised where it happens, it left the other ranks in DeepSpeed's barriers until --timeout."""

    class Engine:
        def __init__(self) -> None:
            self.checkpoint_engine, self.is_through = self, False

        def save(self, *, state_dict: Any, path: str) -> None:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

        def _copy_recovery_script(self, path: str) -> None:
            raise OSError(28, "No space left on device")

        def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
            self.checkpoint_engine.save(state_dict={}, path=folder)
            self._copy_recovery_script(folder)
            self.is_through = True

    engine = Engine()
    with pytest.raises(RuntimeError, match="unexpected pos"):
        save_checkpoint(engine, "somewhere", "engine")
    assert engine.is_through
    assert not {"save", "_copy_recovery_script"} & set(vars(engine))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_does_not_run(tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    file = tmp_path / "engine" / "mp_rank_00_model_states.pt"
    file.parent.mkdir()
    torch.save({"module": _Hostile(tmp_path / "ran")}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_checkpoint(_Engine(), str(tmp_path), "engine")
    assert not (tmp_path / "ran").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_what_deepspeed_writes_is_loaded(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    file = tmp_path / "engine" / "mp_rank_00_model_states.pt"
    file.parent.mkdir()
    torch.save({"loss_scaler": LossScaler(scale=1.0), "stage": ZeroStageEnum.weights, "w": torch.ones(2)}, file)
    assert load_checkpoint(_Engine(), str(tmp_path), "engine") == str(tmp_path)
