"""Recipes: `launch train --policy NAME` trains by each policy that is shipped, on the default engine."""

import json
from pathlib import Path

import pytest

from lpcompile.policy.file import shipped_policies
from tests.launch.test_train import TINY, succeed
from tests.launch.test_update_formats import _prepare

NAMES = [name for name in shipped_policies() if not name.startswith(("fqt-6", "fqt-7", "fqt-8"))]
"""Of FQT two numbers of bits: the others differ in that alone."""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_trains(tmp_path: Path, name: str) -> None:
    _prepare(tmp_path, "{}")
    optimizer = ["--optimizer", "sgd", "--lr", "0.05"] if name in ("fp8-2018", "dlfloat16", "hfp8-2019") else []
    layers = ["--layers", "3"] if name == "nvfp4" else []  # the first and the last are left alone
    run = [*TINY, *layers, *optimizer, "--policy", name, "--nproc", "2", "--steps", "5", "--out", "run"]
    succeed(tmp_path, *run)
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["gemms_as_asked"] == found["gemms"]
    assert found["validation_loss"] < 5.2  # ln 256 is 5.5
