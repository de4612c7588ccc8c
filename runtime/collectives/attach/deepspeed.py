"""DeepSpeed: ZeRO 0 to 3 average their gradients over the compressed wire.

initialize            deepspeed.initialize without its JIT build
save_checkpoint       its engine.save_checkpoint, which a rank whose disk is full leaves with the others
load_checkpoint       its engine.load_checkpoint with an unpickler that runs nothing
attach_deepspeed      wraps the entry points of one engine (deepspeed_entry_points.py) and puts the proxy in place
first_elements        where this rank's part of each flat group begins
detach, detach_all    the way back
assert_active         a wire that carries nothing is an error
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from runtime.collectives.attach.deepspeed_entry_points import Attachment
from runtime.collectives.attach.deepspeed_library import load
from runtime.collectives.attach.deepspeed_proxy import install_globals, remove_globals
from runtime.collectives.codec import WireSpec
from runtime.collectives.counter import WireCounter
from runtime.collectives.exchange import Tamper, open_link
from runtime.errors import WireError


def initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, config: dict[str, Any], lr_scheduler: Any = None
) -> Any:
    """The engine of deepspeed.initialize, without its JIT build and its chatter.

    The shared-memory op that DeepSpeed compiles at every start (100 s, and no start at all without a compiler) serves
    inference only: switched off. With no CUDA the CPU accelerator is named. Its log shows warnings and up.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", message=r".*torch\.distributed.* is deprecated", category=FutureWarning)
    # its timers around a model that is compiled, where Dynamo stops as it should
    warnings.filterwarnings(
        "ignore", message="Dynamo does not know how to trace the builtin `time.time", category=UserWarning
    )
    deepspeed = load("deepspeed")
    for name in ("deepspeed", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    load("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, model_parameters=parameters, lr_scheduler=lr_scheduler, config=config
    )
    return engine


def save_checkpoint(engine: Any, folder: str, tag: str) -> None:
    """engine.save_checkpoint. What a disk refuses one rank is raised once all are through: the others wait for that
    rank in DeepSpeed's barriers.
    """
    refused: list[Exception] = []

    def kept(write: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*arguments: Any, **named: Any) -> Any:
            try:
                return write(*arguments, **named)
            except (OSError, RuntimeError) as error:
                refused.append(error)

        return attempt

    writers = [(engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script")]
    for owner, name in writers:
        setattr(owner, name, kept(getattr(owner, name)))
    try:
        engine.save_checkpoint(folder, tag=tag, save_latest=False)
    finally:
        for owner, name in writers:
            delattr(owner, name)
    if refused:
        raise refused[0]


def load_checkpoint(engine: Any, folder: str, tag: str) -> str | None:
    """engine.load_checkpoint, with an unpickler that makes tensors, plain values and the classes of _IN_CHECKPOINTS,
    and runs nothing else: DeepSpeed's own runs whatever a file says. Returns where it was, or None.

    Raises pickle.UnpicklingError for a file that holds anything else.
    """
    classes = [getattr(load(module), name) for module, name in _IN_CHECKPOINTS]
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"  # of torch.load, over what its caller says
    try:
        with torch.serialization.safe_globals(classes):
            path, _ = engine.load_checkpoint(folder, tag=tag)
    finally:
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before
    return None if path is None else str(path)


_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_IN_CHECKPOINTS = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)
"""What DeepSpeed 0.19 puts into its files beside tensors and plain values, at every stage."""


def first_elements(engine: Any) -> list[int]:
    """Of each group of parameters that ZeRO 1 or 2 keeps as one flat tensor: where in it this rank's part begins."""
    zero = engine.optimizer
    ranks = [dist.get_rank(group) for group in zero.real_dp_process_group]
    return [rank * int(size) for rank, size in zip(ranks, zero.partition_size, strict=True)]


def attach_deepspeed(
    engine: Any,
    spec: WireSpec | None,
    counter: WireCounter,
    tamper: Tamper | None = None,
    *,
    check: bool = False,
) -> None:
    """Send `engine`'s gradients in `spec`, or as DeepSpeed does if None, and count the bytes either way.

    `counter` also gets the parameter gathers and all other traffic of this engine from here on. Attaching again
    replaces; `detach` restores. `check`: ranks compare what they are about to exchange. WireError if the engine reduces
    gradients in a way that bypasses the entry points.
    """
    detach(engine)
    _refuse_what_bypasses(engine)
    attachment = Attachment(engine, spec, counter, tamper, check)
    try:
        attachment.install()
    except WireError:
        attachment.remove()
        raise
    install_globals()
    _ATTACHED.append(attachment)


def detach(engine: Any) -> None:
    """Give `engine` its own methods back, and with the last one DeepSpeed its globals. Nothing if not attached."""
    for attachment in [attachment for attachment in _ATTACHED if attachment.engine is engine]:
        attachment.remove()
        _ATTACHED.remove(attachment)
    if not _ATTACHED:
        remove_globals()


def detach_all() -> None:
    """Detach every engine, so that nothing here keeps its process groups alive into the end of the interpreter."""
    for attachment in list(_ATTACHED):
        detach(attachment.engine)


def assert_active(engine: Any) -> None:
    """WireError if no gradient of `engine` has been compressed, though it should: call it after the first step.

    A training run that silently sends full precision is the failure that this catches.
    """
    for attachment in _ATTACHED:
        if attachment.engine is engine:
            if attachment.spec and attachment.num_compressed == 0 and open_link().world > 1:
                raise WireError(
                    "no gradient went over the compressed wire",
                    where="deepspeed",
                    expected=f"gradients in {attachment.spec.format} in every step",
                    got=f"none of {attachment.spec.min_numel} elements and 2 dims, or none through the entry points",
                    hint="calling assert_active after a step, a larger model, or no wire section",
                )
            return
    raise WireError("this engine has no wire attached", hint="attach_deepspeed(engine, spec, counter)")


_ATTACHED: list[Attachment] = []


def _refuse_what_bypasses(engine: Any) -> None:
    """WireError for every configuration whose gradients would not pass the entry points."""
    for what, hint in _bypasses(engine):
        raise WireError(f"gradients bypass the wire with {what}", where="deepspeed config", hint=hint)


def _bypasses(engine: Any) -> Iterator[tuple[str, str]]:
    """(what is configured, what to try). What a later line asks of the optimizer holds only past the earlier ones."""
    optimizer = engine.optimizer
    if engine.is_deepcompile_enabled() or engine.is_deepcompile_active():
        yield "compile.deepcompile", "leaving it off"
    if engine.pipeline_parallelism:
        yield "pipeline parallelism", "plain data parallelism"
    if hasattr(optimizer, "get_grads_for_reduction"):
        yield "BF16_Optimizer, whose buckets hide the shapes", "stage 2 or 3, or gradients accumulated in bf16"
    if getattr(optimizer, "all2all_process_group", None) is not None:
        yield "zero_quantized_gradients", "leaving it off"
    if engine.zero_optimization_stage() in (1, 2):
        if not optimizer.use_multi_rank_bucket_allreduce:
            yield "use_multi_rank_bucket_allreduce: false", "true, the default"
        if not optimizer.contiguous_gradients:
            yield "contiguous_gradients: false", "true, the default"
