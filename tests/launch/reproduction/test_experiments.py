"""The experiments that train nothing, against numbers of another simulation and by hand; then all, from the shell."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from launch.reproduction import accumulator_width, accuracy, four_bits, fqt, loss_scale, swamping, update_rounding
from launch.reproduction.gradients import output_gradients
from launch.reproduction.training import image_config, text_config, train
from launch.training.images.packaged import is_installed
from tests.machine_facts import needs_kernels

ROOT = Path(__file__).resolve().parents[3]
needs_digits = pytest.mark.skipif(not is_installed("digits"), reason="scikit-learn is not installed")


def test_a_plain_sum_in_bf16_stands_at_1024() -> None:
    """2^7 times the next power of two above the terms' mean: every sum of 4096 ends at 1024."""
    found = swamping.measure("length-4096", "short")
    generator = torch.Generator().manual_seed(4096)
    true_M = ((torch.rand(32, 4096, generator=generator) * 2 - 1) * 3**0.5 + 1).double().sum(dim=1)
    assert found["bf16"]["share"] == pytest.approx((1024 / true_M).mean().item(), rel=1e-12)
    assert found["1-6-9, chunk 64"]["error"] < found["1-6-9"]["error"] / 5
    assert found["fp32"]["error"] < 1e-5


def test_errors_of_four_bit_casts_are_those_that_others_find() -> None:
    """Relative squared errors of 2^20 Gaussians by other code, and the share that is kept: 1 without a bias."""
    found = {key: four_bits._once(key, 2**18, seed=1) for key in four_bits.CASTS}
    expected = {"stochastic": 0.0189, "stochastic-headroom": 0.0234, "ms-eden": 0.0097}
    assert {key: found[key][0] for key in expected} == pytest.approx(expected, rel=0.02)
    assert found["ms-eden"][1] == pytest.approx(1, abs=3e-4)
    assert found["stochastic"][1] == pytest.approx(0.9966, abs=3e-4)
    assert found["four-over-six"][0] < found["nearest"][0] < found["ms-eden"][0]


@pytest.mark.parametrize(
    ("key", "vrr", "nearest", "chunked", "truncated"),  # a simulation of 1000 sums by other code, and VRR by hand
    [
        ("length-256_m05", 0.9598, 1.007, 0.998, 0.187),
        ("length-1024_m04", 0.5653, 0.867, 0.987, 0.024),
        ("length-1024_m06", 0.9453, 0.996, 0.994, 0.102),
        ("length-4096_m08", 0.9990, 0.995, 1.000, 0.106),
    ],
)
def test_variance_that_a_sum_keeps(key: str, vrr: float, nearest: float, chunked: float, truncated: float) -> None:
    found = accumulator_width.measure(key, "short")
    assert found["vrr"] == pytest.approx(vrr, abs=5e-5)
    assert found["nearest"] == pytest.approx(nearest, abs=0.03)
    assert found["chunked"] == pytest.approx(chunked, abs=0.03)
    assert found["truncated"] == pytest.approx(truncated, abs=0.03)
    assert found["nearest_deviation"] < 0.03


def test_the_knee_is_the_narrowest_from_which_on_all_pass() -> None:
    def result(width: int, kept: float) -> dict[str, float]:
        return {"length": 1000, "width": width, "nearest": kept, "nearest_deviation": 1e-4}

    sums = [result(3, 0.9), result(4, 0.9999), result(5, 0.98), result(6, 0.9965), result(7, 1.0)]
    assert accumulator_width._knee(sums, "nearest") == 6, "4 passes by luck, 5 does not"
    assert accumulator_width._knee([result(3, 0.9)], "nearest") is None


def test_noise_by_hand() -> None:
    """A range of 31 in 5 bits is steps of 1; values in the middle of a step are off by half of one, to either side."""
    g_ND = torch.cat([torch.tensor([[0.0, 31.0]]), torch.arange(30.0)[None] + 0.5], dim=1).repeat(4, 1)
    found = fqt.noise(g_ND, "psq5", 100)
    assert found["variance"] == pytest.approx(4 * 30 * 0.25 / g_ND.square().sum().item(), rel=1e-6)
    assert abs(found["bias"]) < 4
    assert fqt.ratio(4) == pytest.approx((15 / 7) ** 2)


@pytest.mark.parametrize("kind", fqt.KINDS)
def test_a_biased_cast_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g_ND, cast = torch.rand(8, 64, generator=torch.Generator().manual_seed(0)), fqt.quantize
    assert abs(fqt.noise(g_ND, f"{kind}5", 200)["bias"]) < 4
    monkeypatch.setattr(fqt, "quantize", lambda *each, **more: cast(*each, **more) + 2e-3)
    assert abs(fqt.noise(g_ND, f"{kind}5", 200)["bias"]) > 4


def test_bhq_spreads_a_large_sample() -> None:
    """One sample of 8 100 times larger: 7.0 times less noise than PSQ by the paper's own code."""
    g_ND = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    g_ND[0] *= 100
    ratio = fqt.noise(g_ND, "psq4", 300)["variance"] / fqt.noise(g_ND, "bhq4", 300)["variance"]
    assert ratio == pytest.approx(7.0, rel=0.1)


def test_an_update_stalls_or_does_not() -> None:
    assert update_rounding.stall("nearest_even") == {"mean": 1.0, "deviation": 0.0}
    found = update_rounding.stall("stochastic")
    assert found["mean"] == pytest.approx(2.0, abs=4 * 0.041 / 32)
    assert found["deviation"] == pytest.approx(0.041, rel=0.1)


def test_shares_of_fp16_by_hand() -> None:
    """2^-25 is a tie that goes to zero; 1e-3 is beyond 65504 from a scale of 2^26 on."""
    found = loss_scale.shares(torch.tensor([2.0**-24, 2.0**-25, -(2.0**-30), 1e-3]))
    of = {power: i for i, power in enumerate(loss_scale._POWERS)}
    assert [found["zero"][of[power]] for power in (0, 2, 4, 6, 8)] == [0.5, 0.25, 0.25, 0.0, 0.0]
    assert [found["beyond"][of[power]] for power in (24, 26)] == [0.0, 0.25]


@needs_digits
def test_gradients_of_the_head_are_those_of_cross_entropy() -> None:
    dy_BK = output_gradients(image_config("resnet", "digits", steps=1, width=8, layers=1))["head"]
    assert dy_BK.shape == (32, 10)
    torch.testing.assert_close(dy_BK.sum(1), torch.zeros(32), atol=1e-7, rtol=0)
    assert ((dy_BK < 0).sum(1) == 1).all(), "the label alone is pulled up"
    assert float(dy_BK.abs().max()) <= 1 / 32


def test_gradients_of_a_gpt_are_those_of_its_products() -> None:
    found = output_gradients(text_config(steps=1, width=16, layers=1))
    assert {name.rpartition(".")[2] for name in found} == {"c_attn", "c_proj", "c_fc", "lm_head"}


@needs_kernels  # sums by the reference take minutes
@needs_digits
def test_a_run_is_repeated_bit_for_bit_and_recipes_start_alike() -> None:
    key = "resnet-digits_fp8-2018_seed01"
    first, again = accuracy.measure(key, "smallest"), accuracy.measure(key, "smallest")
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert first["gemms_as_asked"] == first["gemms"] == 30
    beside = accuracy.measure("resnet-digits_fp32_seed01", "smallest")
    assert beside["curve"][0] == pytest.approx(first["curve"][0], rel=0.1), "the same weights and pictures"
    other = accuracy.measure("resnet-digits_fp32_seed00", "smallest")
    assert other["curve"][0] != beside["curve"][0]


def test_a_run_that_is_given_up_says_why() -> None:
    """Overflow in every step: no number is made up for it."""
    found = train(
        text_config(steps=70, width=8, heads=1, layers=1, context=32, batch=16, lr=1e18, clip=0, policy="fp16")
    )
    assert "were all skipped" in found["stopped"]
    assert found["skipped"] >= 32 + 15  # at the smallest scale, and on the way down to it


def test_the_page_tells_verdicts_of_pairs(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    shift = {"fp32": 0.0, "bf16": 0.001, "fp8-2018": -0.05, "hfp8-2019": 0.0, "int4-fp4-2020": -0.02,
             "int4-fp4-2020-one-phase": -0.019}  # fmt: skip
    results = {
        f"{task}_{recipe}_seed{seed:02d}": {
            "accuracy": 0.9 + 0.01 * seed + change + 1e-4 * ((seed * 7 + len(recipe)) % 3),
            "validation": 2.0 - change - 0.01 * seed - 1e-4 * ((seed * 7 + len(recipe)) % 3),
            "curve": [2.0, 1.0], "stopped": "", "seconds": 1.0, "parameters": 7,
        }
        for task in ("mobilenet-digits", "gpt") for recipe, change in shift.items() for seed in range(6)
    }  # fmt: skip
    told = accuracy.tell(results, "short", tmp_path)
    rows = {tuple(cell.strip() for cell in line.split("|")[1:4]): line for line in told.splitlines() if "**" in line}
    found = {claim: line.rsplit("**", 2)[1] for (claim, _, task), line in rows.items() if task == "mobilenet-digits"}
    assert found == {
        "bf16 within 0.5 of fp32": "reproduced",
        "hfp8-2019 within 0.5 of fp32": "reproduced",
        "fp8-2018 behind hfp8-2019 on a MobileNet and a transformer": "reproduced",
        "int4-fp4-2020 behind fp32 by 1 to 3": "reproduced",
        "two-phase rounding better than one phase": "contradicted",
    }
    of_gpt = {claim: line.rsplit("**", 2)[1] for (claim, _, task), line in rows.items() if task == "gpt"}
    assert of_gpt["fp8-2018 behind hfp8-2019 on a MobileNet and a transformer"] == "reproduced", (
        "a larger loss is worse"
    )
    assert of_gpt["bf16 within 0.5 of fp32"] == "reproduced"
    assert "| fp8-2018 | 6 |" in told
    assert "-5.0" in told
    assert (tmp_path / "accuracy-mobilenet-digits.png").stat().st_size > 1000


def test_the_page_of_half_a_run_claims_nothing_of_the_rest(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")
    keys = [key for key in fqt.units("short") if key.startswith("noise_even")]
    noises = {key: {"variance": 1 / (2 ** int(key[-1]) - 1) ** 2, "bias": 1.0} for key in keys}
    whole = fqt.tell(noises, "short", tmp_path)
    assert whole.count("**reproduced**") == 4, "three quantizers, and PSQ at most PTQ"
    assert "Training" not in whole
    del noises[keys[-1]]
    assert "**" not in fqt.tell(noises, "short", tmp_path)
    biased = {key: {**each, "bias": 5.0 if key == keys[0] else 1.0} for key, each in noises.items()}
    assert "**contradicted**" in fqt.tell(
        {**biased, keys[-1]: {"variance": 1 / 255**2, "bias": 1.0}}, "short", tmp_path
    )

    trained = {
        f"train_{name}_seed{seed:02d}": {"accuracy": 0.9 + 0.01 * seed - 0.02 * (name != "wide")}
        for name in ("wide", "m03") for seed in range(2)
    }  # fmt: skip
    told = accumulator_width.tell(trained, "short", tmp_path)
    assert "| 3 | 0.443 | -2.00, -2.00 to -2.00 (2) | not run yet |" in told


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_of_it_from_the_shell_killed_and_gone_on_with(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")
    command = [sys.executable, "-m", "launch", "reproduce", "--smallest", "--out", "out", "--docs", "docs"]
    settings = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **settings)  # type: ignore[call-overload]
    results = tmp_path / "out" / "smallest"
    while len(list(results.rglob("*.json"))) < 8:
        assert killed.poll() is None
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*.json")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **settings)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(path.stat().st_mtime_ns == when for path, when in before.items()), "nothing is run twice"
    page = (tmp_path / "docs" / "reproduction.md").read_text()
    for title in ("Swamping", "Accumulator width", "FQT", "Rounding of the update", "Loss scale", "Accuracy by recipe"):
        assert f"## {title}" in page
    for plot in ("swamping", "accumulator-width", "fqt-variance", "loss-scale"):
        assert (tmp_path / "docs" / "reproduction" / f"{plot}.png").is_file()
    if is_installed("digits"):
        assert "| hfp8-2019 | 2 |" in page
