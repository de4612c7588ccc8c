"""The monitor: counts and time to go also on a narrow terminal; a closed pipe ends no run."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.training.metrics import StepMetrics
from launch.training.monitor import Monitor

ROOT = Path(__file__).resolve().parents[3]
STEP = StepMetrics(1, 5.5, 1e-3, 123.0, 512, 65536.0, False, 1.0, 0, 0, 0, True)


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_counts_and_time_to_go_are_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: str
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", columns)
    with Monitor("hfp8", 0, 600, True) as monitor:
        for step in (1, 2, 3):
            monitor.show(replace(STEP, step=step))
    shown = capsys.readouterr().out
    assert "3/600" in shown
    assert "-:--:--" in shown or "0:0" in shown
    assert "loss 5.5" in shown


def test_a_reader_that_goes_away_ends_no_run() -> None:
    code = (
        "from launch.training.monitor import Monitor\nimport sys\nmonitor = Monitor('a', 0, 9, True)\n"
        "for number in range(20000):\n    monitor.say(f'line {number}')\nprint('done', file=sys.stderr)"
    )
    command = f'{sys.executable} -c "$CODE" | head -2; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env={"CODE": code, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr, done.stdout) == (0, "done\n", "line 0\nline 1\n")
