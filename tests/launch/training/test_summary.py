"""Summaries: a run that came to nothing ends with a warning and exit code 1; no file holds NaN."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from launch.training.last_words import WorkerError
from launch.training.metrics import MetricsLog, StepMetrics, read_metrics
from launch.training.monitor import why_skipped
from launch.training.summary import Summary, build_table, load_summary, num_workers, present

STEP = StepMetrics(1, 5.5, 1e-3, 10.0, 512, 1.0, False, 1.0, 0, 0, 0, True, 5.0)


def summary(folder: Path) -> Summary:
    return Summary(
        policy="fp32", policy_hash="a", engine="ddp", world_size=1, parameters=10, steps=30, train_loss=5.0,
        validation_loss=5.0, validation_per_byte=5.0, bigram=3.0, ms_per_step=1.0, tokens_per_s=1.0, gradient_bytes=0.0,
        predicted_gradient_bytes=0.0, wire_agrees=True, gradient_bytes_fp32=1, gradient_bytes_bf16=1, total_bytes=0.0,
        gemms=0, gemms_as_asked=0, backends={}, skipped_steps=0, loss_scale=1.0, peak_memory=1, corpus="c",
        corpus_sha256="d", folder=str(folder),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"skipped_steps": 29}, "fp32: 29 of 30 steps were skipped"),
        ({"train_loss": math.nan}, "fp32: the training loss is not finite"),
        ({"train_loss": math.inf}, "fp32: the training loss is not finite"),
        ({"validation_loss": math.nan, "validation_per_byte": math.nan}, "fp32: the validation loss is not finite"),
    ],
)
def test_a_run_that_learned_nothing_ends_with_1(
    tmp_path: Path, change: dict[str, float], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(summary(tmp_path), **change).save()
    with pytest.raises(WorkerError, match=sentence) as caught:
        present(tmp_path)
    assert caught.value.exit_code == 1
    assert "ms per step" in capsys.readouterr().out, "the table is shown all the same"


def test_a_run_that_skipped_half_ends_well(tmp_path: Path) -> None:
    replace(summary(tmp_path), skipped_steps=15).save()
    present(tmp_path)


def _strict(text: str) -> object:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def test_no_file_holds_nan(tmp_path: Path) -> None:
    bad = replace(summary(tmp_path), train_loss=math.nan, bigram=math.inf)
    bad.save()
    _strict((tmp_path / "summary.json").read_text())
    assert math.isnan(load_summary(tmp_path).train_loss)
    log = MetricsLog(tmp_path, 0)
    log.write(replace(STEP, loss=math.nan, validation=math.inf, grad_norm=math.nan))
    log.close()
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        _strict(line)
    assert math.isnan(read_metrics(tmp_path)[0].loss)


def test_a_skip_at_scale_1_is_called_divergence() -> None:
    assert "the run diverges" in why_skipped(replace(STEP, skipped=True))
    assert why_skipped(replace(STEP, skipped=True, loss_scale=8.0)) == "a gradient overflowed; loss scale 8"


def test_one_worker_is_one(tmp_path: Path) -> None:
    assert (num_workers(1), num_workers(2)) == ("1 worker", "2 workers")
    assert "1 worker," in str(build_table([summary(tmp_path)]).title)
