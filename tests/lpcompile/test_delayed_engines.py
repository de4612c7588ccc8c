"""Delayed scales under DDP, FSDP2 and ZeRO 0 to 3, in two real processes, the second of which sees values 100 times
larger: one scale on all ranks, of the largest of both, and a resumed run has the bits of one that was not stopped.
"""

import copy
import tempfile
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lpcompile import Policy, advance, attach, lpcompile
from lpcompile.quantizers import load_rank_state, rank_state
from runtime.collectives.process_group import set_group_timeouts
from runtime.quantize.store import quantizers_of
from tests.multiprocess import run_ranks

_STEPS, _STOP, _MICRO = 5, 3, 2
_NEEDS_DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install 'lpcompile[deepspeed]'"
)


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        pairs = [(nn.Linear(16, 32), nn.Linear(32, 16)) for _ in range(2)]
        self.blocks = nn.ModuleList(nn.Sequential(up, nn.ReLU(), down) for up, down in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def _model(per_rank: bool = False) -> nn.Module:
    x, dy = (
        {"format": format, "scale": {"rule": "delayed", "history": 4, "per_rank": per_rank}}
        for format in ("e4m3", "e5m2")
    )
    rule = {"fwd": {"x": x, "w": x}, "bwd": {"dy": dy, "w": x}, "grad": {"dy": dy, "x": x}}
    return lpcompile(_Blocks(), Policy.model_validate({"name": "delayed", "rules": [rule]}))


def _batch(rank: int, step: int, micro: int = 0) -> Tensor:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(100 * step + 10 * micro + rank))
    return x * (100.0 if rank else 1.0) / (1 + micro)


def _loss(y: Tensor) -> Tensor:
    return y.abs().mean() * 0.01


@pytest.mark.parametrize(
    "engines", [("ddp", "fsdp2"), pytest.param(tuple(f"zero{stage}" for stage in range(4)), marks=_NEEDS_DEEPSPEED)]
)
def test_all_ranks_have_the_scale_of_the_largest(engines: tuple[str, ...]) -> None:
    ranks = run_ranks(work, 2, engines, timeout_s=300)
    for engine in engines:
        whole, resumed, other = (
            {key: torch.from_numpy(value) for key, value in state.items()}
            for state in (*ranks[0][engine], ranks[1][engine][0])
        )
        scales = [key for key in whole if key.startswith("_lp.")]
        assert len(scales) == 4 * 3 * 2
        for key, value in whole.items():
            assert torch.equal(other[key], value), (engine, key)
            assert torch.equal(resumed[key], value), (engine, key, "resumed")
        wanted = [
            max(float(_batch(rank, step, micro).abs().max()) for rank in range(2) for micro in range(_MICRO))
            for step in range(_STEPS)
        ]
        assert whole["_lp.blocks.0.0.x.amax_history"].tolist() == wanted[:0:-1], engine
        assert float(whole["_lp.blocks.0.0.x.in_force"]) == pytest.approx(max(wanted[1:]) / 448, rel=1e-7)
        assert all(float(whole[key]) > 0 for key in scales if key.endswith("in_force"))
        assert all(bool((whole[key] > 0).all()) for key in scales if key.endswith("amax_history"))


def work(rank: int, world: int, engines: tuple[str, ...]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By engine, the state after a whole run and after one that was stopped and resumed."""
    found = {}
    for engine in engines:
        train = _train_zero if engine.startswith("zero") else _train
        found[engine] = (train(rank, engine, stops=False), train(rank, engine, stops=True))
    return found


def _train(rank: int, engine: str, stops: bool) -> dict[str, Any]:
    wrapped, optimizer = _wrap(engine)
    for step in range(_STEPS):
        if stops and step == _STOP:
            saved = get_state_dict(wrapped, optimizer, options=StateDictOptions(full_state_dict=True))
            states = dict(zip(("model_state_dict", "optim_state_dict"), copy.deepcopy(saved)))
            wrapped, optimizer = _wrap(engine)
            options = StateDictOptions(full_state_dict=True)
            set_state_dict(wrapped.module if engine == "ddp" else wrapped, optimizer, **states, options=options)
        for micro in range(_MICRO):
            _loss(wrapped(_batch(rank, step, micro))).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = (wrapped.module if engine == "ddp" else wrapped).state_dict()
    return {key: _whole(value) for key, value in state.items()}


def _whole(value: Tensor) -> Any:
    """As numpy, which a pipe carries whole."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone().numpy()


def _wrap(engine: str) -> tuple[Any, torch.optim.Optimizer]:
    model = _model()
    if engine == "ddp":
        wrapped: nn.Module = DistributedDataParallel(model)
    else:
        for block in model.get_submodule("blocks").children():
            fully_shard(block)
        wrapped = fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    attach(model, optimizer)
    return wrapped, optimizer


def _train_zero(rank: int, engine: str, stops: bool) -> dict[str, Any]:
    import deepspeed

    wrapped = _initialize(int(engine[-1]))
    for step in range(_STEPS):
        if stops and step == _STOP:
            folder = [tempfile.mkdtemp() if rank == 0 else None]
            torch.distributed.broadcast_object_list(folder)
            wrapped.save_checkpoint(folder[0])
            wrapped.destroy()
            wrapped = _initialize(int(engine[-1]))
            assert wrapped.load_checkpoint(folder[0])[0] is not None
        for micro in range(_MICRO):
            wrapped.backward(_loss(wrapped(_batch(rank, step, micro))))
            wrapped.step()
        advance(wrapped)
    with deepspeed.zero.GatheredParameters(list(wrapped.module.parameters())):
        state = {key: _whole(value) for key, value in wrapped.module.state_dict().items()}
    wrapped.destroy()
    return state


def _initialize(stage: int) -> Any:
    from runtime.collectives.attach.deepspeed import initialize

    zero = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": _MICRO,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    model = _model()
    engine = initialize(model, torch.optim.SGD(model.parameters(), lr=0.05), config)
    set_group_timeouts(120)
    return engine


def test_per_rank_each_has_its_own_and_ddp_sends_none_of_it() -> None:
    """Two forwards with a synchronization each before the step; a checkpoint of rank 0's, and each rank's share."""
    (whole0, resumed0), (whole1, resumed1) = run_ranks(per_rank, 2)
    key = "_lp.blocks.0.0.x.in_force"
    assert whole1[key] > 20 * whole0[key]
    for whole, resumed in ((whole0, resumed0), (whole1, resumed1)):
        assert whole == resumed
    for name in whole0:
        if ".dy." not in name:  # of the last layer it has the size that the loss gives it
            assert (whole0[name] != whole1[name]) is (".x." in name), name


def per_rank(rank: int, world: int) -> list[dict[str, Any]]:
    found = []
    for stops in (False, True):
        model = _model(per_rank=True)
        wrapped = DistributedDataParallel(model)
        for step in range(4):
            if stops and step == 2:
                saved = [copy.deepcopy(model.state_dict())]
                own = rank_state(model)
                torch.distributed.broadcast_object_list(saved)  # the checkpoint that rank 0 writes
                model = _model(per_rank=True)
                model.load_state_dict(saved[0])
                load_rank_state(model, own)
                wrapped = DistributedDataParallel(model)
            for micro in range(2):
                _loss(wrapped(_batch(rank, step, micro))).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(0.05 * parameter.grad)
                    parameter.grad = None
            advance(model)
        assert all(each.take_seen() == -1 for each in quantizers_of(model).values())  # type: ignore[attr-defined]
        found.append({key: value.tolist() for key, value in model.state_dict().items()})
    return found
