"""Telemetry: looks at what flows, changes no bit, counts everything once, and predicts what a format would do."""

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lpcompile import LossScaler, LpError, NotSupported, attach, compile_joint, lpcompile, telemetry
from lpcompile.api import restore, run_state
from lpcompile.watching.results import Results
from lpcompile.watching.session import Telemetry
from runtime.ops.product import Product
from tests.models_for_tests import build
from tests.multiprocess import run_ranks

ROW_POLICIES = ["hfp8", "int8-all", "mxfp8", "bf16", "fqt-5-psq", "int4-fp4-2020", "fp32-emulated"]


class Mlp(nn.Module):
    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 16)

    def middle(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(torch.relu(x)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = checkpoint(self.middle, h, use_reentrant=self.how == "reentrant") if self.how else self.middle(h)
        return self.c(h)


def _model(policy: str = "hfp8", how: str = "", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return lpcompile(Mlp(how), policy, example_inputs=(torch.zeros(8, 32),))


def _batch(rows: int = 160, seed: int = 1) -> Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))


def _train(model: nn.Module, steps: int = 3, micro_batches: int = 1) -> list[Tensor]:
    """Losses and gradients of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    attach(model, optimizer)
    scaler, seen = LossScaler(model), []
    for step in range(steps):
        for micro in range(micro_batches):
            loss = model(_batch(seed=10 * step + micro)).square().mean()
            scaler.scale(loss).backward()
            seen.append(loss.detach())
        seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return seen


def _numbers(results: Results) -> dict[tuple[str, str, str], tuple[float, ...]]:
    return {
        (gemm.site, gemm.role, operand.name): (operand.largest, *vars(operand.error).values())
        for gemm in results.gemms
        for operand in gemm.operands
    }


@pytest.mark.parametrize("policy", ROW_POLICIES)
def test_it_changes_no_bit(policy: str) -> None:
    wanted, watched = _train(_model(policy)), _model(policy)
    with telemetry(watched, every=1) as t:
        found = _train(watched)
    assert all(map(torch.equal, found, wanted))
    assert len(found) == len(wanted)
    assert len(t.results().gemms) > 0


@pytest.mark.parametrize("name", ["gpt2-sdpa", "llama-eager"])
def test_it_changes_no_bit_of_a_transformer(name: str) -> None:
    """Intercepted products too, with dropout, whose random numbers stay what they were."""
    losses = []
    for watches in (False, True):
        example = build(name)
        model = lpcompile(example.model, "bf16", example_kwargs=example.batch)
        torch.manual_seed(3)
        t = telemetry(model, every=1) if watches else None
        loss = model(**example.batch).loss
        loss.backward()
        losses.append([loss.detach(), torch.rand(3), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(map(torch.equal, *losses))
    assert t is not None
    ops = {gemm.described.op for gemm in t.results().gemms}
    assert ops == {"linear", "matmul"}
    assert {operand.name for gemm in t.results().gemms for operand in gemm.operands} == {"x", "w", "dy", "a", "b"}


def test_only_multiples_of_every_are_looked_at() -> None:
    model = _model()
    with telemetry(model, every=3) as t:
        _train(model, steps=8)
    assert [record.step for record in t.records] == [0, 3, 6]


def test_nothing_runs_between(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    model = _model()
    state = run_state(model)
    assert state is not None
    run = Product._run

    def noted(self: Product, *args: Any) -> Tensor:
        seen.append(state.watcher is not None)
        return run(self, *args)

    monkeypatch.setattr(Product, "_run", noted)
    with telemetry(model, every=4):
        _train(model, steps=5)
    assert seen == [True] * 3 + [False] * 9 + [True] * 3


def test_without_attach_each_change_of_the_weights_is_a_step() -> None:
    model = _model("bf16")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with telemetry(model, every=2) as t:
        for _ in range(5):
            for _ in range(2):
                model(_batch()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [record.step for record in t.records] == [0, 2, 4]
    assert t.results().gemms[0].operands[0].error.count == 3 * 2 * 160 * 32


@pytest.mark.parametrize("how", ["reentrant", "saved tensors"])
def test_recomputation_counts_once(how: str) -> None:
    results = []
    for way in ("", how):
        model = _model(how=way)
        with telemetry(model, every=1) as t:
            _train(model, steps=1)
        results.append(_numbers(t.results()))
    assert results[0] == results[1]


def test_micro_batches_of_a_step_add_up() -> None:
    model, apart = _model("bf16"), []
    with telemetry(model, every=5) as t:
        _train(model, steps=1, micro_batches=2)
    for micro in range(2):
        alone = _model("bf16")
        with telemetry(alone, every=5) as part:
            alone(_batch(seed=micro)).square().mean().backward()
        apart.append(_numbers(part.results()))
    for at, (largest, *sums) in _numbers(t.results()).items():
        assert largest == max(each[at][0] for each in apart)
        assert sums == pytest.approx([a + b for a, b in zip(*(each[at][1:] for each in apart))], rel=1e-12)


def test_evaluation_is_not_looked_at() -> None:
    model = _model("bf16")
    with telemetry(model, every=1) as t:
        loss = model(_batch()).square().mean()
        with torch.no_grad():
            model(1000 * _batch())
        loss.backward()
        found = _numbers(t.results())
    assert ("a", "grad", "dy") in found
    assert found["a", "fwd", "x"][0] == _batch().abs().max()
    with torch.no_grad(), telemetry(model, every=1, inference=True) as t:
        model(_batch())
    assert {gemm.role for gemm in t.results().gemms} == {"fwd"}


def test_close_leaves_nothing() -> None:
    model = _model()
    hooks, state = dict(model._forward_pre_hooks), run_state(model)
    assert state is not None
    t = telemetry(model, every=1)
    loss = model(_batch()).square().mean()
    t.close()
    t.close()
    assert model._forward_pre_hooks == hooks
    assert state.watcher is None
    loss.backward()  # its graph was made while somebody looked
    assert {gemm.role for gemm in t.results().gemms} == {"fwd"}
    telemetry(model).close()


def test_a_copy_is_not_looked_at() -> None:
    model = _model()
    with telemetry(model, every=1) as t:
        model(_batch()).sum().backward()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert run_state(other).watcher is None  # type: ignore[union-attr]
            other(1e6 * _batch()).sum().backward()
        assert t.results().gemms[0].operands[0].largest < 100


def test_a_session_that_nobody_holds_looks_no_longer() -> None:
    model = _model()
    telemetry(model, every=1)
    model(_batch()).sum().backward()
    assert run_state(model).watcher is None  # type: ignore[union-attr]


def test_recompiled_and_restored() -> None:
    model = _model("bf16")
    with telemetry(model, every=1) as t:
        lpcompile(model, "hfp8", example_inputs=(_batch(),))
        model(_batch()).sum().backward()
        assert {operand.cast.split()[0] for gemm in t.results().gemms for operand in gemm.operands} >= {"hfp8-143"}
        restore(model)
        model(_batch()).sum().backward()
        assert len(t.records) == 1


@pytest.mark.parametrize(
    ("name", "policy"),
    [("mxfp8:scale=rceil", "mxfp8"), ("e4m3 tensor", "te-current"), ("int8 row", "int8-all"), ("bf16", "bf16")],
)
def test_a_prediction_is_what_the_format_does_when_it_runs(name: str, policy: str) -> None:
    """Weights and input of the first layer are the same under every policy: there the numbers must be equal."""
    found = []
    for each in ("fp32-emulated", policy):
        model = _model(each)
        with telemetry(model, every=1, counterfactuals=[name], sample=3000) as t:
            model(_batch()).square().mean().backward()
        found.append({(gemm.site, gemm.role): gemm for gemm in t.results().gemms})
    predicted, ran = found
    for site, role, side in (("a", "fwd", 0), ("a", "fwd", 1), ("b", "fwd", 1), ("b", "bwd", 1), ("a", "grad", 1)):
        of_it, real = predicted[site, role].operands[side], ran[site, role].operands[side]
        assert of_it.candidates[name] == real.error, (site, role, side)
        assert real.sqnr_db is not None


def test_what_is_measured_is_what_the_product_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid and the scale that reach the product of FWD, against the error that is told."""
    import runtime.ops.product as module

    given: list[dict[str, Any]] = []
    run_gemm = module.run_gemm

    def noted(lhs: Tensor, rhs: Tensor, bias: Any, casts: Any, *args: Any, **kwargs: Any) -> Tensor:
        given.append({"x": lhs.detach(), "cast": casts["fwd_lhs"]})
        return run_gemm(lhs, rhs, bias, casts, *args, **kwargs)

    monkeypatch.setattr(module, "run_gemm", noted)
    torch.manual_seed(0)
    layer = lpcompile(nn.Linear(256, 256), "te-current", example_inputs=(torch.zeros(8, 256),))
    with telemetry(layer, every=1, sample=10**7) as t:
        layer(torch.randn(512, 256)).sum().backward()
    cast, x = given[-1]["cast"], given[-1]["x"].double()
    values = cast.grid.double() * cast.scale.double()
    wanted = 10 * torch.log10(x.square().sum() / (values - x).square().sum())
    assert t.results().gemms[0].operands[0].sqnr_db == pytest.approx(float(wanted), abs=1e-4)


def test_gradients_are_those_before_the_cast() -> None:
    layer = lpcompile(nn.Linear(16, 16), "te-current", example_inputs=(torch.zeros(4, 16),))
    x = torch.randn(4, 16, requires_grad=True)
    with telemetry(layer, every=1) as t:
        (layer(x) * torch.arange(16.0)).sum().backward()
    by_role = {gemm.role: gemm for gemm in t.results().gemms}
    assert by_role["bwd"].operands[0].largest == 15.0
    assert by_role["grad"].operands[0].largest == 15.0
    assert by_role["grad"].operands[1].name == "x"


def test_convolutions_say_what_could_not_run() -> None:
    model = lpcompile(nn.Conv2d(4, 8, 3), "te-current", example_inputs=(torch.zeros(2, 4, 9, 9),))
    with telemetry(model, every=1) as t:
        model(torch.randn(2, 4, 9, 9)).sum().backward()
    gemm = t.results().gemms[0]
    assert "nvfp4" not in gemm.operands[0].candidates
    assert "blocks of nvfp4" in gemm.refused["nvfp4"]
    assert "e4m3 tensor" in gemm.operands[0].candidates
    assert "not measured where it could not run: nvfp4" in t.to_text()


def test_json_holds_the_numbers() -> None:
    model = _model()
    with telemetry(model, every=1) as t:
        _train(model, steps=2)
    read = json.loads(t.to_json())
    assert read["steps"] == [0, 1]
    assert len(read["counterfactuals"]) >= 5
    gemm = next(each for each in read["gemms"] if (each["site"], each["role"]) == ("b", "fwd"))
    assert {*gemm["operands"][0]} >= {"amax", "underflow", "overflow", "saturated", "sqnr_db", "mean_relative_error"}
    assert {*gemm["operands"][0]["counterfactuals"]} == {*read["counterfactuals"]}
    assert {(each["step"], *each["gemm"]) for each in read["history"]} >= {(1, "b", "grad", "dy")}


def _never(model: nn.Module) -> None: ...


def _without_gradients(model: nn.Module) -> None:
    with torch.no_grad():
        model(_batch())


@pytest.mark.parametrize(
    ("run", "sentence"), [(_never, "a model that never ran"), (_without_gradients, "1 forwards without gradients")]
)
def test_a_model_that_never_ran(run: Callable[[nn.Module], None], sentence: str) -> None:
    model = _model()
    with telemetry(model) as t:
        run(model)
    ways: list[Callable[[Telemetry], Any]] = [Telemetry.to_text, Telemetry.to_json, Telemetry.suggest]
    for way in ways:
        with pytest.raises(LpError, match=f"nothing was looked at.*multiple of 50.*{sentence}"):
            way(t)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"every": 0}, "not a number of steps. Expected 1 or more. Got 0"),
        ({"every": 2.5}, "Got 2.5"),
        ({"sample": 0}, "not a number of elements"),
        ({"counterfactuals": ["mxfp9"]}, 'Did you mean "mxfp8"'),
        ({"counterfactuals": ["e4m3 rwo"]}, "not a scale granularity"),
        ({"counterfactuals": ["fp32"]}, "nothing to measure"),
        ({"counterfactuals": "bf16"}, "are a list"),
    ],
)
def test_arguments(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LpError, match=sentence):
        telemetry(_model(), **given)


def test_models_that_cannot_be_looked_at() -> None:
    with pytest.raises(LpError, match="was not compiled"):
        telemetry(nn.Linear(4, 4))
    with pytest.raises(LpError, match=r"names no GEMM.*fp32-emulated"):
        telemetry(lpcompile(nn.Linear(4, 4), "fp32"))
    model = _model()
    with telemetry(model), pytest.raises(LpError, match="looks at this model already"):
        telemetry(model)
    with pytest.raises(NotSupported, match=r"torch.compile runs this model"):
        telemetry(compile_joint(_model(), backend="aot_eager"))
    frozen = lpcompile(Mlp().eval(), "bf16", example_inputs=(_batch(),), mode="infer")
    with pytest.raises(NotSupported, match='mode="infer"'):
        telemetry(frozen)


def _rank(rank: int, world: int) -> tuple[float, list[Any], list[Any]]:
    runs = []
    for watches in (False, True):
        model = _model()
        parallel = nn.parallel.DistributedDataParallel(model)
        t = telemetry(parallel, every=1) if watches and rank == 0 else None
        parallel((rank + 1.0) * _batch()).square().mean().backward()
        runs.append([p.grad.tolist() for p in model.parameters() if p.grad is not None])
    return t.results().gemms[0].operands[0].largest if t else 0.0, runs[0], runs[1]


def test_ddp_tells_of_the_rank_that_looks() -> None:
    ranks = run_ranks(_rank, 2)
    assert ranks[0][0] == _batch().abs().max()
    assert all(wanted == found for _, wanted, found in ranks)
