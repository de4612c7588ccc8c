"""A DeepSpeed checkpoint of somebody else's runs nothing when it is loaded."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.collectives.attach.deepspeed import load_checkpoint


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class _Engine:
    """Loads as DeepSpeed's engine does, without a restriction of its own."""

    def load_checkpoint(self, folder: str, tag: str) -> Any:
        return folder, torch.load(Path(folder) / tag / "mp_rank_00_model_states.pt", weights_only=False)


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
