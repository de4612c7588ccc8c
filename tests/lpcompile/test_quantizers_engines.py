"""Quantizers with state under DDP, FSDP2 and ZeRO 0 to 3, in two real processes: they learn what one process learns
from both halves of the batch, all ranks the same, and a resumed run has the bits of one that was not stopped.
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

from lpcompile import Policy, lp_parameters, lpcompile
from runtime.collectives.process_group import set_group_timeouts
from tests.multiprocess import run_ranks

_BATCH, _STEPS, _STOP = 8, 4, 2
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


def _model() -> nn.Module:
    """PACT after the relus, LSQ everywhere else."""
    lsq = {"format": "int4", "quantizer": {"kind": "lsq"}}
    pact = {"format": "uint4", "quantizer": {"kind": "pact", "init": 0.5}}
    rules = [
        {
            "match": {"name": name},
            "fwd": {"x": x, "w": lsq},
            "bwd": {"dy": "fp32", "w": lsq},
            "grad": {"dy": "fp32", "x": x},
        }
        for name, x in (("*.2", pact), ("*", lsq))
    ]
    return lpcompile(_Blocks(), Policy.model_validate({"name": "learned", "rules": rules}))


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    learned = {id(each) for each in lp_parameters(model)}
    rest = [each for each in model.parameters() if id(each) not in learned]
    return torch.optim.SGD([{"params": rest}, {"params": lp_parameters(model), "lr": 0.1}], lr=0.05, momentum=0.9)


def _batch(step: int) -> Tensor:
    return 2 * torch.randn(_BATCH, 16, generator=torch.Generator().manual_seed(step))


def _alone() -> dict[str, Tensor]:
    """What one process learns from whole batches."""
    model = _model()
    optimizer = _sgd(model)
    for step in range(_STEPS):
        model(_batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize(
    "engines", [("ddp", "fsdp2"), pytest.param(tuple(f"zero{stage}" for stage in range(4)), marks=_NEEDS_DEEPSPEED)]
)
def test_an_engine_learns_what_one_process_does(engines: tuple[str, ...]) -> None:
    wanted = _alone()
    first = _model().state_dict()
    ranks = run_ranks(work, 2, engines, timeout_s=300)
    learned = [key for key in wanted if key.startswith("_lp.") and not key.endswith("base")]
    assert len(learned) == 8
    for engine in engines:
        whole, resumed, other = (
            {key: torch.from_numpy(value) for key, value in state.items()}
            for state in (*ranks[0][engine], ranks[1][engine][0])
        )
        assert other.keys() == whole.keys() == wanted.keys(), engine
        for key, value in wanted.items():
            torch.testing.assert_close(whole[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}")
            assert torch.equal(other[key], whole[key]), (engine, key)
            assert torch.equal(resumed[key], whole[key]), (engine, key, "resumed")
        assert all(not torch.equal(whole[key], first[key]) for key in learned), engine


def work(rank: int, world: int, engines: tuple[str, ...]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By engine, the state after a whole run and after one that was stopped and resumed."""
    found = {}
    for engine in engines:
        train = _train_zero if engine.startswith("zero") else _train
        found[engine] = (train(rank, engine, stops=False), train(rank, engine, stops=True))
    return found


def _half(rank: int, step: int) -> Tensor:
    return _batch(step)[rank * _BATCH // 2 : (rank + 1) * _BATCH // 2]


def _train(rank: int, engine: str, stops: bool) -> dict[str, Any]:
    wrapped, optimizer = _wrap(engine)
    for step in range(_STEPS):
        if stops and step == _STOP:
            saved = get_state_dict(wrapped, optimizer, options=StateDictOptions(full_state_dict=True))
            states = dict(zip(("model_state_dict", "optim_state_dict"), copy.deepcopy(saved)))
            wrapped, optimizer = _wrap(engine)
            options = StateDictOptions(full_state_dict=True)
            set_state_dict(wrapped.module if engine == "ddp" else wrapped, optimizer, **states, options=options)
        wrapped(_half(rank, step)).square().mean().backward()
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
        return DistributedDataParallel(model), _sgd(model)
    for block in model.get_submodule("blocks").children():
        fully_shard(block)
    fully_shard(model)
    return model, _sgd(model)


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
        wrapped.backward(wrapped(_half(rank, step)).square().mean())
        wrapped.step()
    with deepspeed.zero.GatheredParameters(list(wrapped.module.parameters())):
        state = {key: _whole(value) for key, value in wrapped.module.state_dict().items()}
    wrapped.destroy()
    return state


def _initialize(stage: int) -> Any:
    from runtime.collectives.attach.deepspeed import initialize

    zero = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
    config = {
        "train_micro_batch_size_per_gpu": _BATCH // 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    model = _model()
    engine = initialize(model, _sgd(model), config)
    set_group_timeouts(120)
    return engine
