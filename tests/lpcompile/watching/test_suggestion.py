"""The suggested policy: a layer that was made bad is named first, and its rule gives the loss of fp32 back."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
import torch
from torch import Tensor, nn

from lpcompile import LossScaler, Policy, attach, load_policy, lpcompile, report, telemetry
from lpcompile.watching.session import Telemetry

UNSCALED = """
version: 1
name: unscaled-e4m3
rules:
  - match: {op: linear}
    fwd: {x: e4m3, w: e4m3}
    bwd: {dy: e5m2, w: e4m3}
    grad: {dy: e5m2, x: e4m3}
loss_scale: {kind: dynamic, init: 65536}
"""
STEPS = 120


def _whole(h: Tensor) -> Tensor:
    return 1000 * h


def _one_channel(h: Tensor) -> Tensor:
    return h * torch.ones(h.shape[-1]).index_fill_(0, torch.tensor([5]), 1e5)


class Planted(nn.Module):
    """A chain of layers; the input of one is made large, and what it gives small again."""

    def __init__(self, grow: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 64), *(nn.Linear(64, 64) for _ in range(3)), nn.Linear(64, 4)])
        self.grow = grow

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number == 2:
                x = layer(self.grow(x)) / self.grow(torch.ones_like(x)).amax()
            else:
                x = layer(x)
            x = x if number == 4 else torch.tanh(2 * x)
        return x


def _loss(policy: str | Policy, grow: Callable[[Tensor], Tensor], seed: int) -> tuple[float, Telemetry | None]:
    """Of the last steps of a training run."""
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
    model = Planted(grow)
    lpcompile(model, policy, example_inputs=(torch.zeros(2, 16),))
    optimizer, scaler, losses = torch.optim.Adam(model.parameters(), lr=2e-3), LossScaler(model), []
    attach(model, optimizer)
    t = None if policy == "fp32" else telemetry(model, every=40)
    data = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        x = torch.randn(128, 16, generator=data)
        with torch.no_grad():
            y = 3 * teacher(x)
        loss = (model(x) - y).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    if t is not None:
        t.close()
    return mean(losses[-20:]), t


@pytest.mark.parametrize("grow", [_whole, _one_channel])
@pytest.mark.parametrize("policy", ["hfp8", pytest.param("unscaled", marks=pytest.mark.slow)])
def test_a_planted_layer_is_named_first_and_mended(
    policy: str, grow: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    """Measured over three seeds: planted 1.25 to 2.2 times the loss of fp32, mended 1.00 to 1.04 times; the loss of
    fp32 itself differs by 15% from seed to seed.
    """
    if policy == "unscaled":
        policy = str(tmp_path / "unscaled-e4m3.yaml")
        Path(policy).write_text(UNSCALED)
    exact, _ = _loss("fp32", grow, seed=0)
    planted, t = _loss(policy, grow, seed=0)
    assert t is not None
    assert t.results().ranking[0].site == "layers.2"
    assert t.suggestion().mends[0].gemm.site == "layers.2"
    suggested = tmp_path / "suggested.yaml"
    suggested.write_text(t.suggest())
    assert load_policy(suggested).rules[-1] == load_policy(policy).rules[-1]  # it extends what ran
    mended, after = _loss(str(suggested), grow, seed=0)
    assert planted > 1.25 * exact
    assert abs(mended - exact) < 0.05 * exact
    assert after is not None
    assert after.suggestion().mends == ()


def _planted(policy: str | Policy = "hfp8", **given: object) -> tuple[nn.Module, Telemetry]:
    torch.manual_seed(0)
    model = Planted(_whole)
    x = torch.randn(128, 16)
    lpcompile(model, policy, example_inputs=(x,))
    scaler = LossScaler(model)
    with telemetry(model, every=1, **given) as t:  # type: ignore[arg-type]
        scaler.scale(model(x).square().mean()).backward()
    return model, t


def test_the_predicted_sqnr_is_what_the_rule_gives(tmp_path: Path) -> None:
    """In the first step the tensors of FWD up to this layer are the same under both policies."""
    _, t = _planted()
    (tmp_path / "s.yaml").write_text(t.suggest())
    _, after = _planted(str(tmp_path / "s.yaml"))
    mend = next(each for each in t.suggestion().mends if each.gemm.role == "fwd")
    found = next(each for each in after.results().gemms if (each.site, each.role) == ("layers.2", "fwd"))
    assert found.sqnr_db == pytest.approx(mend.predicted_db, abs=1e-9)
    assert mend.predicted_db > 25 > 1 > (mend.gemm.sqnr_db or 0.0)
    assert f"-> {mend.predicted_db:.1f} dB" in t.suggest()


def test_what_is_suggested_runs(tmp_path: Path) -> None:
    _, t = _planted()
    (tmp_path / "s.yaml").write_text(t.suggest())
    model, _ = _planted(str(tmp_path / "s.yaml"))
    rows = [row for row in report(model).gemms if row.name == "layers.2"]
    assert {row.role: row.lhs for row in rows}["fwd"] == "e4m3 nearest_even tensor/amax"
    assert all(row.runs_as_policy_says for row in rows)
    assert not report(model).unmatched_rules


def test_what_it_extends(tmp_path: Path) -> None:
    assert "extends:\n- hfp8\n" in _planted("hfp8")[1].suggest()
    path = tmp_path / "unscaled.yaml"
    path.write_text(UNSCALED)
    assert f"extends:\n- {path}\n" in _planted(str(path))[1].suggest()
    assert "extends:\n- other.yaml\n" in _planted(str(path))[1].suggest("other.yaml")
    made = load_policy(str(path)).model_copy(update={"name": "made"})
    text = _planted(made)[1].suggest()
    assert "extends" not in text
    (tmp_path / "s.yaml").write_text(text)
    read = load_policy(tmp_path / "s.yaml")
    assert read.rules[-1] == made.rules[-1]
    assert read.loss_scale == made.loss_scale


def test_nothing_to_mend() -> None:
    torch.manual_seed(0)
    model = lpcompile(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)), "mxfp8")
    with telemetry(model, every=1) as t:
        model(torch.randn(64, 32)).sum().backward()
    assert t.suggestion().mends == ()
    assert "no rule to add" in t.suggest()


def test_no_candidate_helps() -> None:
    _, t = _planted(counterfactuals=["int4 tensor"])
    assert t.suggestion().mends == ()
    assert "# layers.2 fwd has 0.4 dB, and no format that was measured does better." in t.suggest()


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    _, t = _planted()
    page = t.to_html(tmp_path / "t.html").read_text()
    assert page.count("<svg") >= 5
    assert "$" not in page
    for outside in ("<script", "<link", "<img", "@import", "url("):
        assert outside not in page
    assert page.replace("http://www.w3.org/2000/svg", "").count("http") == 0
    assert all(f"layers.{number}" in page for number in range(5))
    assert "e4m3 tensor" in page
    assert str(tmp_path) not in page


def test_the_page_escapes_names(tmp_path: Path) -> None:
    model = nn.Module()
    model.add_module("<b>", nn.Linear(8, 8))
    model.forward = lambda x: model.get_submodule("<b>")(x)  # type: ignore[method-assign]
    lpcompile(model, "bf16")
    with telemetry(model, every=1) as t:
        model(torch.randn(4, 8)).sum().backward()
    page = t.to_html(tmp_path / "t.html").read_text()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


def test_the_text_names_the_worst_first() -> None:
    _, t = _planted()
    lines = t.to_text(3).splitlines()
    assert lines[2].split()[:2] == ["GEMM", "SQNR"]
    assert lines[3].startswith("layers.2")
    assert "x hfp8-143" in lines[3]
    assert "... and" in lines[6]
