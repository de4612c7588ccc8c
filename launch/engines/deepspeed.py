"""DeepSpeed: ZeRO 0-3 shards optimizer states, gradients and weights over the ranks."""

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launch.engines.engine import AbstractEngine
from launch.training.config import RunConfig
from launch.training.optimizer import build_optimizer, is_torch_adamw
from launch.training.world import World
from lpcompile.optimizers import update_formats
from runtime.collectives import ledger
from runtime.collectives.attach import deepspeed as ds
from runtime.collectives.codec import WireSpec
from runtime.collectives.counter import WireCounter
from runtime.errors import LpError, NotSupported
from runtime.optim.formats import UpdateFormats
from runtime.optim.optimizer import AbstractOptimizer
from runtime.optim.split_master import SPLIT

_TAG = "engine"


class DeepSpeedEngine(AbstractEngine):
    """deepspeed.initialize with our AdamW as its client: no compiled optimizer, no loss scaler of its own."""

    def __init__(self, model: nn.Module, config: RunConfig, wire: WireSpec | None, world: World) -> None:
        self._config, self._world = config, world
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._shapes = [tuple(parameter.shape) for parameter in parameters]  # here: ZeRO-3 empties the parameters
        update = update_formats(model)
        _check_update(config, update)
        self._optimizer = build_optimizer(config, parameters, update)
        logging.getLogger("DeepSpeed").addFilter(_is_news)
        self._engine: Any = ds.initialize(model.to(world.device), self._optimizer, _settings(config, world))
        if isinstance(self._optimizer, AbstractOptimizer) and config.zero_stage in (1, 2):
            self._optimizer.begin_at(ds.first_elements(self._engine))
        self._counter = WireCounter()
        ds.attach_deepspeed(self._engine, wire, self._counter)
        self._is_checked = False

    @property
    def name(self) -> str:
        return f"deepspeed ZeRO-{self._config.zero_stage}"

    @property
    def counter(self) -> WireCounter:
        return self._counter

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self._engine(**inputs).logits
        return logits

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()  # the engine counts micro-batches itself: step() before the last one only counts

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self, lr: float, skip: bool) -> float | None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.skip = skip
        norm = self._whole_norm() if self._config.zero_stage == 0 and self._config.dtype != "bf16" else None
        self._engine.step()
        if not self._is_checked:  # a wire that silently carries full precision must not survive the first step
            ds.assert_active(self._engine)
            self._is_checked = True
        norm = self._engine.get_global_grad_norm() if norm is None else norm
        return None if norm is None else float(norm)

    def _whole_norm(self) -> float:
        """Of gradients that every rank holds whole, reduced: DeepSpeed does not keep the norm that it clips them by."""
        gradients = [each.grad for each in self._engine.module.parameters() if each.grad is not None]
        return nn.utils.get_total_norm(gradients).item()

    def uncompressed_bytes(self, dtype: torch.dtype) -> int:
        stage, size = self._config.zero_stage, self._world.size
        reductions = self._config.grad_accumulation if stage >= 2 else 1  # ZeRO-2 and 3 reduce every micro-batch
        if stage == 3:
            once = ledger.predict_reduce_scatter(self._shapes, dtype, None, size, self._world.rank)
        else:
            once = ledger.predict_all_reduce(self._shapes, dtype, None, size)
        return once.total * reductions

    def save(self, folder: Path) -> None:
        ds.save_checkpoint(self._engine, str(folder), _TAG)

    def load(self, folder: Path) -> None:
        path = ds.load_checkpoint(self._engine, str(folder), _TAG)
        if path is None:
            raise LpError("DeepSpeed found nothing to load", where=str(folder / _TAG))


def _check_update(config: RunConfig, update: UpdateFormats) -> None:
    """NotSupported for an update that this stage cannot make. From ZeRO-1 on, and with bf16 parameters, DeepSpeed hands
    over flat fp32 masters of its own: of ZeRO 1 and 2 it is known where in its group each begins.
    """
    stage = config.zero_stage
    if is_torch_adamw(config, update) or (stage == 0 and config.dtype == "fp32"):
        return
    wrong = got = ""
    if stage == 3:
        wrong, got = "ZeRO-3 has AdamW in fp32 alone", f"{config.optimizer}, master {update.master}"
    elif stage == 0 and update.rounding == "stochastic":
        wrong, got = "an element of DeepSpeed's flat masters does not know its random bits", "rounding: stochastic"
    elif update.master == SPLIT:
        wrong, got = "DeepSpeed keeps fp32 masters of its own", f"master: {SPLIT}"
    if wrong:
        raise NotSupported(
            wrong, where=f"update of the policy, --engine deepspeed --zero-stage {stage} --dtype {config.dtype}",
            expected="the defaults" if stage == 3 else "a rounding to nearest and a scalar master", got=got,
            hint="--engine ddp, or --zero-stage 0 --dtype fp32",
        )  # fmt: skip


def _is_news(line: logging.LogRecord) -> bool:
    """False for the warning that our AdamW is not DeepSpeed's own: tests/launch resume it at every stage."""
    return "untested optimizer" not in line.getMessage()


def _settings(config: RunConfig, world: World) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": config.batch,
        "gradient_accumulation_steps": config.grad_accumulation,
        "train_batch_size": config.batch * config.grad_accumulation * world.size,
        "gradient_clipping": config.clip,
        "bf16": {"enabled": config.dtype == "bf16"},
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,  # ours is AdamW with a step that can be skipped
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
