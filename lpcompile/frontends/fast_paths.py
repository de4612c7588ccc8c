"""Fast paths: torch's TransformerEncoder and its layers, in evaluation without gradients, run one fused function that
reads the weights of their children and calls none of them. Under a policy that would silently be full precision.

Both decide by an attribute of their own; here it is set to "no" while something inside is compiled, and put back after.
"""

from collections.abc import Collection
from typing import Any

from torch import nn


def close_fast_paths(model: nn.Module) -> None:
    """Let every encoder and encoder layer call its children. Done before the example call."""
    for module in model.modules():
        for kind, name, closed in _SWITCHES:
            if isinstance(module, kind) and hasattr(module, name):
                vars(module).setdefault(_SAVED, getattr(module, name))
                setattr(module, name, closed)


def reopen_fast_paths(model: nn.Module, compiled: Collection[str] = ()) -> None:
    """Undo close_fast_paths where no module of the paths `compiled` lies inside."""
    for path, module in model.named_modules():
        if _SAVED in vars(module) and not any(each.startswith(f"{path}." if path else "") for each in compiled):
            saved: Any = vars(module).pop(_SAVED)
            for kind, name, _ in _SWITCHES:
                if isinstance(module, kind):
                    setattr(module, name, saved)


_SWITCHES = (
    (nn.TransformerEncoder, "use_nested_tensor", False),
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
)

_SAVED = "_lp_fast_path"
