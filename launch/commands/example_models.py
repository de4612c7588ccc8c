"""Example models: a small model and a call of it, for commands that look at graphs and train nothing.

    gpt, llama, resnet ...     what `train` trains, at its default sizes
    LlamaForCausalLM           a class of transformers, built from its config with small sizes
    package.module:callable    whatever returns a model, or (model, args) or (model, kwargs); also of the current folder
    a/folder                   what save_pretrained of transformers wrote

Nothing is fetched from a hub.
"""

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launch.training.config import RunConfig
from launch.training.models.build import build_model
from launch.training.models.registry import MODEL_NAMES, reads_images
from lpcompile.errors import LpError, did_you_mean, nearest_names

_VOCABULARY, _ROWS, _TOKENS, _PIXELS = 97, 2, 8, 16
_MOST_PARAMETERS = 20_000_000
_OTHERS = "a folder of transformers, or module:callable"
_OWN_SIZES = "module:callable that builds it with sizes of your own"


@dataclass(frozen=True)
class ExampleModel:
    """A model, and arguments that it can be called with; None: no call is known."""

    model: nn.Module
    args: tuple[Any, ...] | None = None
    kwargs: dict[str, Any] | None = field(default=None)


def example_model(name: str) -> ExampleModel:
    """The model called `name`, as the head of this file lists them. Raises LpError."""
    torch.manual_seed(0)
    if ":" in name:
        return _from_callable(name)
    if (Path(name) / "config.json").is_file():
        return _from_folder(Path(name))
    if name in MODEL_NAMES:
        config = RunConfig(model=name)
        if reads_images(name):
            model = build_model(config, classes=10, channels=3, size=_PIXELS)
            return ExampleModel(model, None, {"pixel_values": torch.randn(_ROWS, 3, _PIXELS, _PIXELS)})
        model = build_model(config, vocab=_VOCABULARY)
        return ExampleModel(model, None, {"input_ids": _tokens()})
    import transformers  # here: the import takes seconds

    cls: Any = getattr(transformers, name, None)
    is_model = inspect.isclass(cls) and issubclass(cls, transformers.PreTrainedModel)
    if not is_model or getattr(cls, "config_class", None) is None:
        close = nearest_names(name, (*MODEL_NAMES, *(each for each in dir(transformers) if "For" in each)))
        guess = close.partition(" Known")[0] if close.startswith('"') else ""
        what = did_you_mean(f'"{name}" is not a model', guess) if guess else f'"{name}" is not a model'
        raise LpError(what, hint=f"{', '.join(MODEL_NAMES)}, a class of transformers, {_OTHERS}")
    return _from_transformers(name, cls)


def _from_callable(name: str) -> ExampleModel:
    path, _, attribute = name.partition(":")
    try:
        with _current_folder_on_path():
            make = getattr(importlib.import_module(path), attribute)
    except (ImportError, AttributeError) as error:
        raise LpError(
            f'"{name}" is not there', got=str(error), hint="module:callable, the module on the path"
        ) from error
    except Exception as error:  # whatever a module does when it is imported
        raise LpError(f'"{name}" is not there', got=_sentence(error), hint="a module that imports") from error
    try:
        made = make()
    except LpError:
        raise
    except Exception as error:  # a user's own function
        hint = "a callable without arguments, which returns a model"
        raise LpError(f'"{name}" raises', got=_sentence(error), hint=hint) from error
    model, call = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not (call is None or isinstance(call, (tuple, list, dict))):
        expected = "a torch.nn.Module, or a pair of one and the arguments of a call, a tuple or a dict"
        raise LpError(f'"{name}" gives no model', expected=expected, got=type(made).__name__)
    if isinstance(call, dict):
        return ExampleModel(model, None, call)
    return ExampleModel(model, None if call is None else tuple(call))


@contextmanager
def _current_folder_on_path() -> Iterator[None]:
    """The console script, unlike `python -m`, does not look there."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _from_folder(folder: Path) -> ExampleModel:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        cls = getattr(transformers, (getattr(config, "architectures", None) or ["AutoModel"])[0])
        model = cls.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever is wrong with files of others
        hint = "a folder that save_pretrained wrote, with its weights"
        raise LpError(f'"{folder}" holds no model', got=_sentence(error), hint=hint) from error
    return ExampleModel(model, None, _batch(model, config))


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _from_transformers(name: str, cls: Any) -> ExampleModel:
    try:
        default = cls.config_class()
        sizes = {key: value for key, value in _SIZES.items() if isinstance(getattr(default, key, None), int)}
        config = cls.config_class(**sizes, **{key: None for key in _NO_TOKENS if hasattr(default, key)})
        with torch.device("meta"):
            num_parameters = sum(parameter.numel() for parameter in cls(config).parameters())
        model = cls(config) if num_parameters <= _MOST_PARAMETERS else None
    except Exception as error:  # whatever a config of other sizes makes a class of others do
        raise LpError(
            f"{name} does not build at small sizes", got=str(error).partition("\n")[0], hint=_OWN_SIZES
        ) from error
    if model is None:
        expected, got = f"at most {_MOST_PARAMETERS:,} parameters", f"{num_parameters:,}"
        raise LpError(f"{name} does not build at small sizes", expected=expected, got=got, hint=_OWN_SIZES)
    return ExampleModel(model, None, _batch(model, config))


def _batch(model: nn.Module, config: Any) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = getattr(config, "image_size", 32)
        size = (size, size) if isinstance(size, int) else tuple(size)
        return {"pixel_values": torch.randn(_ROWS, getattr(config, "num_channels", 3), *size)}
    vocabulary = getattr(config, "vocab_size", None) or _VOCABULARY
    batch: dict[str, Any] = {"input_ids": _tokens(vocabulary)}
    if "decoder_input_ids" in parameters:
        batch["decoder_input_ids"] = _tokens(vocabulary)
    if "use_cache" in parameters:
        batch["use_cache"] = False
    return batch


def _tokens(vocabulary: int = _VOCABULARY) -> torch.Tensor:
    return torch.randint(0, min(vocabulary, _VOCABULARY), (_ROWS, _TOKENS), generator=torch.Generator().manual_seed(0))


_SIZES = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "intermediate_size": 128,
    "d_ff": 128,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "n_layer": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "d_kv": 16,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_local_experts": 4,
}
"""What a config has of these is set."""
_NO_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Their defaults may lie outside the small vocabulary."""
