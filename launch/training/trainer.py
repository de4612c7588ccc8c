"""The story of a run, as one worker lives it.

    data -> model -> lpcompile -> engine -> (resume) -> steps -> checkpoint, certificate, summary

A step: micro-batches forward and backward under the loss scale, one small all-reduce of loss and overflow, clip and
update (or skip), advance the compiled model's clock.
"""

import math
import resource
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from launch.engines.engine import AbstractEngine
from launch.engines.registry import engine_class
from launch.training import checkpoint
from launch.training.agreement import check_agreement
from launch.training.config import RunConfig, with_absolute_paths
from launch.training.dataset import Dataset, load_dataset
from launch.training.last_words import WorkerError, is_lost_peer, is_timeout, leave_last_words, resume_hint, told
from launch.training.metrics import MetricsLog, StepMetrics
from launch.training.models.build import build_model
from launch.training.models.registry import MODELS
from launch.training.monitor import Monitor
from launch.training.optimizer import stated_bytes
from launch.training.precision_log import PrecisionLog
from launch.training.precision_options import parse_precision_options
from launch.training.record import LossScaleRecord, RunRecord, check_corpus, check_resumable, has_checkpoint
from launch.training.run_folder import prepare_folder
from launch.training.running_statistics import RunningStatistics
from launch.training.scaling import GradientUnscaler
from launch.training.summary import Summary, total
from launch.training.world import World, bound_waiting, join_world
from lpcompile import Policy, advance, compile_joint, load_policy, lpcompile, report
from lpcompile.api import run_state
from lpcompile.errors import LoweringWarning
from lpcompile.frontends.joint.compiling import Backend
from lpcompile.quantizers import load_rank_state, rank_state
from lpcompile.reporting.trouble import trouble_of
from runtime.collectives.counter import StepBytes
from runtime.errors import LpError
from runtime.optim.loss_scale import MAX_SKIPS, LossScale

_BACKENDS: dict[str, Backend] = {"joint": "aot_eager", "inductor": "inductor"}
_EVALUATION_STREAM = 2**10 - 1  # the last micro-batch number that has a random stream; no training one gets there


def work(config: RunConfig, is_prepared: bool) -> Path:
    """Train as one of the workers that torchrun started; returns the run's folder.

    is_prepared: the folder is there and empty, made by whoever started the workers.
    """
    with join_world(config) as world:
        policy = load_policy(config.policy)
        folder = Path(str(config.out)) if is_prepared else _agree_on_folder(config, policy, world)
        try:
            Run(config, policy, folder, world).train()
        except LpError:
            raise
        except Exception as error:
            raise _explained(error, config, folder, world) from error
        return folder


def _explained(error: Exception, config: RunConfig, folder: Path, world: World) -> Exception:
    """The error as a sentence where it is no fault of the code: a frozen rank, a lost one, a full disk."""
    if is_timeout(error) and (frozen := world.watch.find_frozen()):
        names = ", ".join(map(str, frozen))
        sentence = WorkerError(
            f"worker {names} is frozen: no sign of life, and a collective waited in vain",
            where=str(folder),
            expected=f"an answer in {config.timeout:g} s (--timeout)",
            hint=resume_hint(folder),
        )
        leave_last_words(sentence, 1)
        for rank in frozen:
            world.watch.end_frozen(rank)
        return sentence
    if is_timeout(error):
        return WorkerError(
            f"worker {world.rank} waited in vain for a collective of the others",
            where=str(folder),
            expected=f"an answer in {config.timeout:g} s (--timeout)",
            hint=resume_hint(folder),
        )
    if of_the_machine := told(error, folder):
        return of_the_machine
    leave_last_words(error, 1, follows=is_lost_peer(error))
    if is_lost_peer(error):
        return WorkerError("another worker was lost", 1, where=str(folder), hint=resume_hint(folder))
    return error


def learning_rate(config: RunConfig, step: int) -> float:
    """Linear warm-up from lr / warmup, then `config.schedule`, which falls to lr / 10 at most; steps count from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, config.steps - config.warmup)
    falls = {
        "constant": 0.0,
        "cosine": 0.5 * (1 - math.cos(math.pi * share)),
        "trapezoid": max(0.0, 1 - (config.steps - step) / (0.2 * config.steps)),
    }
    return config.lr * (1 - 0.9 * falls[config.schedule])


class Run:
    """One worker's run: everything built, nothing stepped yet."""

    def __init__(self, config: RunConfig, policy: Policy, folder: Path, world: World) -> None:
        self.config, self.policy, self.folder, self.world = config, policy, folder, world
        with world.together():
            self.data: Dataset = load_dataset(config)
            self.model: nn.Module = build_model(config, **self.data.sizes).to(world.device)
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        check_agreement(config, policy.hash, self.data.content_sha256, self.num_parameters, world)
        self.scale = _loss_scale(policy)
        self._compile()
        self.unscaler = GradientUnscaler(self.model, self.scale, world)
        self.engine = _build_engine(self.model, config, policy, world)
        self.statistics = RunningStatistics(self.model, world)
        if config.capture in _BACKENDS:
            compile_joint(self.model, backend=_BACKENDS[config.capture])
        bound_waiting(config)
        self.skips = 0

    def train(self) -> None:
        start, notes = self._resume()
        log = MetricsLog(self.folder, start) if self.world.is_first else None
        precision = self._look(log) if log and self.config.telemetry else None
        with Monitor(self.policy.name, start, self.config.steps, self.world.is_first, self.data.unit) as monitor:
            for note in notes:
                monitor.say(f"warning: {note}")
            if self.config.warmup >= self.config.steps:
                monitor.say(
                    f"warning: --warmup {self.config.warmup} is not over in {self.config.steps} steps: the rate ends at"
                    f" {learning_rate(self.config, self.config.steps - 1):g} and never reaches --lr {self.config.lr:g}"
                )
            monitor.say(f"data: {self.data.name}, sha256 {self.data.sha256[:16]}")
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            held = stated_bytes(self.config, trained, self.policy.update.formats())
            monitor.say(f"optimizer: {self.config.optimizer}, {self.policy.update}{held}")
            if self.data.skipped:
                what = "UTF-8 text" if self.data.unit == "token" else "pictures of a class"
                monitor.say(f"warning: {self.data.skipped} files are not {what} and were left out")
            certificate = report(self.model)
            for finding in certificate.warnings:
                if not finding.is_wrong:
                    monitor.say(f"warning: {finding}")
            if trouble := trouble_of(certificate):
                monitor.say(f"warning: {trouble}. certificate.txt tells all")
            for step in range(start, self.config.steps):
                metrics = self.step(step)
                monitor.show(metrics)
                if log:
                    log.write(metrics)
                if precision:
                    precision.write()
                if _is_due(step + 1, self.config.save_every, self.config.steps):
                    self._save(step + 1)
            for line in precision.close() if precision else ():
                monitor.say(line)
        peak = self.world.largest(_peak_memory(self.world))
        self._certify()
        if log:
            log.close()
            self._summarize(log.steps, int(peak)).save()
        dist.barrier()

    def _look(self, log: MetricsLog) -> PrecisionLog:
        """At the numbers of this rank, which is the first: the others have other tensors of the same layers."""
        options = parse_precision_options(str(self.config.telemetry))
        return PrecisionLog(self.model, options, self.policy, self.folder, log.board)

    def _compile(self) -> None:
        """Rewrite the model as its policy says, and write the certificate of what became of each GEMM."""
        x, _ = self.data.batch(self.config, 0, 0, self.world.rank, self.world.size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LoweringWarning)  # the monitor tells it
            lpcompile(
                self.model,
                self.policy.over(self.config.steps),
                example_kwargs=self._inputs(x),
                mode="train",
                strict=self.config.strict,
                seed=self.config.seed,
            )
        self._certify()

    def _certify(self) -> None:
        """Written at the start, for a run that is lost, and at the end, when it is known which calls ran otherwise."""
        if self.world.is_first:
            certificate = report(self.model)
            (self.folder / "certificate.json").write_text(certificate.to_json())
            (self.folder / "certificate.txt").write_text(certificate.to_text())

    def _resume(self) -> tuple[int, list[str]]:
        """The number of the first step, 0 or where a checkpoint stopped, and what was wrong with newer ones.

        A worker lost after the last step restarts where nothing is left to train: the run is finished all the same.
        """
        place = self.config.resume
        if self.world.restart and has_checkpoint(self.folder):
            place = str(self.folder)
        if place is None:
            return 0, []
        found, notes = checkpoint.find_sound_checkpoint(place, self.world)
        check_resumable(found, self.policy.name, self.policy.hash, self.world.size)
        with self.world.together():
            record, own = checkpoint.load_checkpoint(found, self.engine, self.world)
        check_corpus(found, record, self.data.content_sha256, self.data.name)
        self.scale.load_state_dict(record.loss_scale.model_dump())
        load_rank_state(self.model, own)
        advance(self.model, to_step=record.step - self.scale.skipped)
        if notes:
            notes.append(f"going on from {found}, step {record.step}")
        return record.step, notes

    def step(self, step: int) -> StepMetrics:
        """One optimizer step, and the validation if one is due; called by all ranks."""
        began = time.perf_counter()
        self.statistics.keep()
        sums = self.unscaler.gather(self._accumulate(step))
        skip = sums.must_skip(self.scale)
        self.statistics.agree(skip)
        lr = learning_rate(self.config, step - self.scale.skipped)  # a step that was skipped moves no schedule
        grad_norm = self.engine.step(lr, skip)
        self._count_skips(skip)
        self.scale.update(skip)
        advance(self.model, skipped=skip)
        sent = self.engine.counter.close_step()
        ms = 1000 * (time.perf_counter() - began)
        self._check_alive(step, sums.overflowed)
        is_evaluated = _is_due(step + 1, self.config.eval_every, self.config.steps)
        validation, accuracy = self.evaluate() if is_evaluated else (None, None)
        return StepMetrics(
            step=step + 1,
            loss=sums.loss,
            lr=lr,
            ms=ms,
            tokens=self._rows_per_step() * self.data.units_per_row(self.config),
            loss_scale=self.scale.value,
            skipped=skip,
            grad_norm=grad_norm if grad_norm is not None and math.isfinite(grad_norm) else None,
            gradient_bytes=sent.gradient,
            parameter_bytes=sent.counted.get("parameter_gather", 0),
            predicted_gradient_bytes=_predicted_gradient(sent),
            wire_agrees=sent.agrees,
            validation=validation,
            accuracy=accuracy,
            overflowed=sums.overflowed if skip else "",
        )

    def _accumulate(self, step: int) -> torch.Tensor:
        """Forward and backward of every micro-batch; their mean loss on this rank."""
        config, losses = self.config, []
        self.model.train()
        for micro in range(config.grad_accumulation):
            x, y = self.data.batch(config, step, micro, self.world.rank, self.world.size)
            self._set_micro_batch(micro)
            with self.engine.micro_batch(last=micro == config.grad_accumulation - 1):
                logits_NK = self.engine.forward(self._inputs(x)).flatten(0, -2)
                loss = cross_entropy(logits_NK.float(), y.flatten().to(self.world.device))
                self.engine.backward(self.unscaler.scaled(loss))
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Mean loss over the validation split and the share of it that is answered right, the same on every rank."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        self.model.eval()
        self._set_micro_batch(_EVALUATION_STREAM)
        for x, y, counted in self.data.validation_batches(self.config, self.world.rank, self.world.size):
            logits_NK = self.engine.forward(self._inputs(x))[:counted].flatten(0, -2).float()
            targets_N = y[:counted].flatten().to(self.world.device)
            losses = cross_entropy(logits_NK, targets_N, reduction="sum")
            right = (logits_NK.argmax(dim=-1) == targets_N).sum()
            sums += torch.stack([losses.double(), right.double(), sums.new_tensor(targets_N.numel())])
        self.model.train()  # the certificate is of the mode that the model is in
        self.engine.counter.close_step()  # what evaluation gathers is no training step's
        dist.all_reduce(sums)
        loss, accuracy = (sums[:2] / sums[2]).tolist()
        return loss, accuracy

    def _inputs(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        dtype = torch.bfloat16 if x.is_floating_point() and self.config.dtype == "bf16" else x.dtype
        return {MODELS[self.config.model].input_name: x.to(self.world.device, dtype)}

    def _rows_per_step(self) -> int:
        return self.config.batch * self.config.grad_accumulation * self.world.size

    def _set_micro_batch(self, micro: int) -> None:
        if state := run_state(self.model):
            state.micro_batch = micro

    def _count_skips(self, skip: bool) -> None:
        """Those in a row that no smaller loss scale follows."""
        self.skips = self.skips + (skip and self.scale.is_lowest) if skip else 0

    def _check_alive(self, step: int, overflowed: str) -> None:
        """A run that only skips is over; say so instead of burning its steps. Its last checkpoint stays."""
        if self.skips < MAX_SKIPS:
            return
        kept = f"; its last checkpoint is in {self.folder}" if has_checkpoint(self.folder) else ""
        error = LpError(
            f"the last {MAX_SKIPS} steps were all skipped because their gradients overflowed, and the loss scale can "
            f"go no lower{kept}",
            where=f"step {step + 1}",
            got=f"loss scale {self.scale.value:g} ({self.scale.kind}), overflow first in {overflowed or 'no layer'}",
            hint="a smaller --lr, a dynamic loss_scale in the policy, or formats with a wider range",
        )
        error.is_of_all_ranks = True
        raise error

    def _save(self, step: int) -> None:
        record = RunRecord(
            step=step,
            world_size=self.world.size,
            policy_name=self.policy.name,
            policy_hash=self.policy.hash,
            corpus_sha256=self.data.content_sha256,
            files=[],
            loss_scale=LossScaleRecord(**self.scale.state_dict()),
            config=with_absolute_paths(self.config).model_dump(),
            torch_version=torch.__version__,
        )
        own = rank_state(self.model)
        checkpoint.save_checkpoint(self.folder, record, self.policy.to_yaml(), self.engine, self.world, own)
        self.engine.counter.close_step()

    def _summarize(self, steps: list[StepMetrics], peak_memory: int) -> Summary:
        sums = total(steps)
        validation = next((step.validation for step in reversed(steps) if step.validation is not None), math.nan)
        accuracy = next((step.accuracy for step in reversed(steps) if step.accuracy is not None), math.nan)
        per_byte = self.data.bytes_per_unit
        certificate = report(self.model)
        return Summary(
            policy=self.policy.name,
            policy_hash=self.policy.hash,
            engine=self.engine.name,
            world_size=self.world.size,
            parameters=self.num_parameters,
            steps=steps[-1].step,
            train_loss=sums.train_loss,
            validation_loss=validation,
            validation_per_byte=validation / per_byte if per_byte else None,
            bigram=self.data.bigram,
            accuracy=accuracy,
            unit=self.data.unit,
            ms_per_step=sums.ms_per_step,
            tokens_per_s=sums.tokens_per_s,
            gradient_bytes=sums.gradient_bytes,
            predicted_gradient_bytes=sums.predicted_gradient_bytes,
            wire_agrees=sums.wire_agrees,
            gradient_bytes_fp32=self.engine.uncompressed_bytes(torch.float32),
            gradient_bytes_bf16=self.engine.uncompressed_bytes(torch.bfloat16),
            total_bytes=sums.total_bytes,
            gemms=len(certificate.gemms),
            gemms_as_asked=sum(gemm.runs_as_policy_says for gemm in certificate.gemms),
            backends=certificate.by_backend(),
            skipped_steps=sums.skipped_steps,
            loss_scale=self.scale.value,
            peak_memory=peak_memory,
            corpus=self.data.name,
            corpus_sha256=self.data.sha256,
            folder=str(self.folder),
            graphs=certificate.num_graphs,
            products_in_graphs=certificate.num_rewritten,
        )


def _agree_on_folder(config: RunConfig, policy: Policy, world: World) -> Path:
    """Rank 0 makes the folder (its default name holds the time), or its error is everybody's."""
    made: Path | LpError | None = None
    if world.restart and config.out and has_checkpoint(Path(config.out)):
        return Path(config.out)
    if world.is_first:
        try:
            made = prepare_folder(config, policy.name)
        except LpError as error:
            made = error
    folder = world.from_first(made)
    assert isinstance(folder, Path)
    return folder


def _build_engine(model: nn.Module, config: RunConfig, policy: Policy, world: World) -> AbstractEngine:
    return engine_class(config.engine)(model, config, policy.wire.spec() if policy.wire else None, world)


def _loss_scale(policy: Policy) -> LossScale:
    section = policy.loss_scale
    return LossScale(section.kind, section.init, section.growth, section.backoff, section.interval, section.min)


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _predicted_gradient(sent: StepBytes) -> int:
    return sent.predicted.get("gradient_compressed", 0) + sent.predicted.get("gradient_full", 0)


def _peak_memory(world: World) -> float:
    """Bytes: on a GPU the largest allocation, else the largest resident set (Linux counts it in KiB)."""
    if world.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(world.device))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
