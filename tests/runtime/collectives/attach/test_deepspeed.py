"""DeepSpeed ZeRO over the compressed wire in real processes: losses, bytes, padding, tampering, refusals."""

import os
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from runtime.collectives.attach.deepspeed import (
    assert_active,
    attach_deepspeed,
    detach,
    initialize,
)
from runtime.collectives.attach.deepspeed_library import load
from runtime.collectives.codec import WireSpec
from runtime.collectives.counter import WireCounter
from runtime.collectives.exchange import Tamper
from runtime.collectives.process_group import init_process_group_safely, set_group_timeouts
from runtime.errors import WireError
from tests.multiprocess import free_port, run_ranks
from tests.runtime.collectives.attach.test_ddp import TinyGPT, batch, fingerprint, loss_of, rotate_layers

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install 'lpcompile[deepspeed]'"
)

SLOW = pytest.mark.slow
CASES = [
    pytest.param((0, 2, "default"), id="stage0"),
    pytest.param((2, 2, "default"), id="stage2"),
    pytest.param((1, 2, "default"), id="stage1", marks=SLOW),
    pytest.param((3, 2, "default"), id="stage3", marks=SLOW),
    *(pytest.param((stage, 2, "bf16"), id=f"stage{stage}-bf16", marks=SLOW) for stage in range(4)),
    *(pytest.param((stage, 2, "small_buckets"), id=f"stage{stage}-small-buckets", marks=SLOW) for stage in (1, 2, 3)),
    *(pytest.param((stage, 2, "all_reduce"), id=f"stage{stage}-all-reduce", marks=SLOW) for stage in (1, 2, 3)),
    *(pytest.param((stage, 4, "default"), id=f"stage{stage}-w4", marks=SLOW) for stage in (0, 2, 3)),
]
ZERO: dict[str, dict[str, Any]] = {
    "default": {},
    "bf16": {},
    "small_buckets": {"reduce_bucket_size": 20000, "overlap_comm": True},
    "all_reduce": {"reduce_scatter": False},
}
Case = tuple[int, int, str]
LAUNCHED: dict[tuple[Case, ...], list[dict[Case, Any]]] = {}


@pytest.fixture(params=CASES)
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What `train` found on each rank. Cases of this session that differ only in the stage share one launch."""
    items: list[Any] = request.session.items
    wanted = {item.callspec.params["ranks"] for item in items if _has_case(item)}
    world = request.param[1]
    cases = tuple(sorted(case for case in wanted if case[1:] == request.param[1:]))
    if cases not in LAUNCHED:
        LAUNCHED[cases] = run_ranks(train_all, world, cases, timeout_s=280)
    return [found[request.param] for found in LAUNCHED[cases]]


def _has_case(item: Any) -> bool:
    return item.fspath == __file__ and "ranks" in getattr(getattr(item, "callspec", None), "params", {})


def engine_of(stage: int, flavour: str = "default", micro_batches: int = 1, **zero: Any) -> Any:
    model = TinyGPT()
    if flavour == "bf16":
        model = model.bfloat16()
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": flavour == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000000, **ZERO[flavour], **zero},
    }
    return initialize(model, torch.optim.AdamW(model.parameters(), 4e-3), config)


def steps_of(engine: Any, rank: int, first: int, count: int) -> list[float]:
    losses = []
    for step in range(first, first + count):
        tokens, targets = batch(rank, step)
        loss = loss_of(engine(tokens), targets)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def train_all(rank: int, world: int, cases: tuple[Case, ...]) -> dict[Case, dict[str, Any]]:
    return {case: train(rank, case[0], case[2]) for case in cases}


def train(rank: int, stage: int, flavour: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    runs: tuple[tuple[str, WireSpec | None, Tamper | None, int], ...] = (
        ("plain", None, None, 10),
        ("e4m3", WireSpec("e4m3"), None, 10),
        ("tampered", WireSpec("e4m3"), rotate_layers, 5),
    )
    for name, spec, tamper, num_steps in runs:
        micro_batches = 2
        engine, counter = engine_of(stage, flavour, micro_batches), WireCounter()
        attach_deepspeed(engine, spec, counter, tamper, check=name == "e4m3")
        set_group_timeouts(60)
        # Deterministic mode fills uninitialized memory with NaN: DeepSpeed's own padding, above all.
        torch.use_deterministic_algorithms(name == "e4m3")
        losses = []
        for step in range(num_steps):
            losses += steps_of(engine, rank, micro_batches * step, micro_batches)
            counter.close_step()
        assert_active(engine)
        torch.use_deterministic_algorithms(False)
        detach(engine)
        found[name] = {"losses": losses, "steps": counter.steps, "norm": float(engine.get_global_grad_norm() or 0.0)}
        if stage < 3:
            found[name]["fingerprint"] = fingerprint(engine.module)
    return found


def test_losses_follow_the_uncompressed_run(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        plain, compressed = (torch.tensor(found[name]["losses"]) for name in ("plain", "e4m3"))
        assert plain[-1] < 0.9 * plain[0]
        assert (compressed - plain).abs().max() < 0.05


def test_tampering_changes_the_losses(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        tampered = torch.tensor(found["tampered"]["losses"])
        difference = tampered - torch.tensor(found["plain"]["losses"])[: len(tampered)]
        assert difference.abs().max() > 0.1


def test_counted_bytes_are_the_predicted_ones(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for name in ("plain", "e4m3"):
            for step in found[name]["steps"]:
                assert step.agrees, step
                assert step.gradient > 0


def test_bytes_are_at_most_about_a_quarter_of_fp32(ranks: list[dict[str, Any]], request: pytest.FixtureRequest) -> None:
    limit = 0.54 if "bf16" in request.node.name else 0.27
    for found in ranks:
        plain, compressed = (found[name]["steps"][-1].gradient for name in ("plain", "e4m3"))
        assert compressed <= limit * plain


def test_parameters_and_all_else_travel_as_before(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        plain, compressed = (found[name]["steps"][-1].counted for name in ("plain", "e4m3"))
        assert plain.get("parameter_gather") == compressed.get("parameter_gather")
        assert plain.get("other") == compressed.get("other")


def test_ranks_hold_the_same_parameters(ranks: list[dict[str, Any]]) -> None:
    for name in ("plain", "e4m3"):
        assert len({found[name].get("fingerprint") for found in ranks}) == 1


def life_cycle(rank: int, world: int, port: int) -> dict[str, Any]:
    """Everything that needs engines and few steps, in one launch."""
    restarts = _restarts(rank, world, port)
    comm = load("deepspeed.comm.comm")
    stage3 = load("deepspeed.runtime.zero.stage3")
    engine, other = engine_of(2), engine_of(0)
    before = (comm.cdb, stage3.reduce_scatter_coalesced, dict(vars(engine)), dict(vars(engine.optimizer)))
    first, second, third = WireCounter(), WireCounter(), WireCounter()
    found: dict[str, Any] = {"restarts": restarts, "unattached": _sentence(assert_active, engine)}
    attach_deepspeed(engine, WireSpec(), first)
    found["too_early"] = _sentence(assert_active, engine)
    attach_deepspeed(engine, WireSpec(), second)  # replaces
    attach_deepspeed(other, None, third)
    for step in range(2):
        steps_of(engine, rank, step, 1)
        steps_of(other, rank, step, 1)
    assert_active(engine)
    assert_active(other)
    found["kinds"] = [set(counter.close_step().counted) - {"other"} for counter in (first, second, third)]
    detach(other)
    steps_of(other, rank, 2, 1)
    steps_of(engine, rank, 2, 1)
    found["after_detach"] = [bool(counter.close_step().gradient) for counter in (first, second, third)]
    detach(engine)
    detach(engine)
    after = (comm.cdb, stage3.reduce_scatter_coalesced)
    left = {"forward", "backward", "step", "average_tensor", "allreduce_and_scatter", "allreduce_bucket"}
    names = (set(vars(engine)) - set(before[2])) | (set(vars(engine.optimizer)) - set(before[3]))
    found["restored"] = after[0] is before[0] and after[1] is before[1] and not names & left
    attach_deepspeed(engine, WireSpec(min_numel=10**9), first)
    steps_of(engine, rank, 3, 1)
    found["nothing_compressed"] = _sentence(assert_active, engine)
    detach(engine)
    reduces = engine_of(2, use_multi_rank_bucket_allreduce=False)
    found["multi_rank"] = _sentence(attach_deepspeed, reduces, WireSpec(), first)
    engine.is_deepcompile_active = lambda: True
    found["deepcompile"] = _sentence(attach_deepspeed, engine, WireSpec(), first)
    return found


def _restarts(rank: int, world: int, port: int) -> list[float]:
    """Sums over two generations of processes as torchrun would restart them, the second with the first one's store."""
    sums = []
    for restart in range(2):
        dist.destroy_process_group()
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RESTART_COUNT=str(restart))
        init_process_group_safely(60)
        init_process_group_safely(60)
        set_group_timeouts(30)
        total = torch.ones(1)
        dist.all_reduce(total)
        sums.append(total.item())
    return sums


def _sentence(call: Any, *arguments: Any) -> str:
    try:
        call(*arguments)
    except WireError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def lives() -> list[dict[str, Any]]:
    return run_ranks(life_cycle, 2, free_port())


def test_engines_side_by_side_keep_their_own_wire(lives: list[dict[str, Any]]) -> None:
    for found in lives:
        replaced, compressed, plain = found["kinds"]
        assert replaced == set()
        assert compressed == {"gradient_compressed", "gradient_full", "parameter_gather"}
        assert plain == {"gradient_full"}
        assert found["after_detach"] == [False, True, False]


def test_detach_restores_everything(lives: list[dict[str, Any]]) -> None:
    assert all(found["restored"] for found in lives)


def test_assert_active_fails_closed(lives: list[dict[str, Any]]) -> None:
    for found in lives:
        assert "has no wire attached" in found["unattached"]
        assert "no gradient went over" in found["too_early"]
        assert "no gradient went over" in found["nothing_compressed"]


def test_refuses_what_bypasses_the_entry_points(lives: list[dict[str, Any]]) -> None:
    for found in lives:
        assert "use_multi_rank_bucket_allreduce" in found["multi_rank"]
        assert "deepcompile" in found["deepcompile"]


def test_process_groups_survive_a_restart_on_the_same_store(lives: list[dict[str, Any]]) -> None:
    assert all(found["restarts"] == [2.0, 2.0] for found in lives)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_engine_without_entry_points_is_refused(stage: int) -> None:
    optimizer = SimpleNamespace(use_multi_rank_bucket_allreduce=True, contiguous_gradients=True)
    engine = SimpleNamespace(
        optimizer=optimizer,
        zero_optimization_stage=lambda: stage,
        is_deepcompile_enabled=lambda: False,
        is_deepcompile_active=lambda: False,
        pipeline_parallelism=False,
    )
    with pytest.raises(WireError, match="has no"):
        attach_deepspeed(engine, WireSpec(), WireCounter())
    assert not {"forward", "step", "allreduce_bucket"} & set(vars(engine))
    assert set(vars(optimizer)) == {"use_multi_rank_bucket_allreduce", "contiguous_gradients"}


def _attach_with_wide_accumulation(rank: int, world: int) -> tuple[str, str]:
    """ZeRO-1 whose gradients are bf16 and accumulated in fp32."""
    model = TinyGPT().bfloat16()
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 1},
    }
    engine = initialize(model, torch.optim.AdamW(model.parameters(), 4e-3), config)
    try:
        attach_deepspeed(engine, WireSpec("e4m3"), WireCounter())
    except WireError as error:
        return type(engine.optimizer).__name__, str(error)
    return type(engine.optimizer).__name__, ""


def test_zero_1_that_accumulates_bf16_in_fp32_is_refused() -> None:
    for kind, said in run_ranks(_attach_with_wide_accumulation, 2, timeout_s=280):
        assert kind == "BF16_Optimizer"
        assert "gradients bypass the wire with BF16_Optimizer, whose buckets hide the shapes. Try stage 2 or 3" in said


def test_missing_deepspeed_is_a_sentence() -> None:
    with pytest.raises(WireError, match="needs deepspeed"):
        load("deepspeed.no_such_module")


def test_no_torchrun_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(WireError, match="MASTER_ADDR"):
        init_process_group_safely()
