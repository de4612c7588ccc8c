"""The front door: lpcompile(model, policy) compiles a model in place; report(model) says what came of it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lpcompile.api import advance, attach, lpcompile, original_state_dict
    from lpcompile.errors import LoweringError, LoweringWarning, LpError, LpWarning, NotSupported, PolicyError
    from lpcompile.frontends.joint.compiling import compile_joint
    from lpcompile.loss_scaler import LossScaler
    from lpcompile.optimizers import make_optimizer
    from lpcompile.policy.file import load_policy
    from lpcompile.policy.resolve import Policy
    from lpcompile.quantizers import lp_parameters
    from lpcompile.reporting.certificate import report
    from lpcompile.watching.session import telemetry

__all__ = [
    "LossScaler", "LoweringError", "LoweringWarning", "LpError", "LpWarning", "NotSupported", "Policy", "PolicyError",
    "advance", "attach", "compile_joint", "load_policy", "lp_parameters", "lpcompile", "make_optimizer",
    "original_state_dict", "report", "telemetry",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Looked up when it is first asked for: a policy is read, and a command line shown, without torch."""
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(_FROM[name]), name)
    return globals()[name]


_FROM = {
    "LossScaler": "lpcompile.loss_scaler",
    **dict.fromkeys(
        ("LoweringError", "LoweringWarning", "LpError", "LpWarning", "NotSupported", "PolicyError"), "lpcompile.errors"
    ),
    "Policy": "lpcompile.policy.resolve",
    "advance": "lpcompile.api",
    "attach": "lpcompile.api",
    "compile_joint": "lpcompile.frontends.joint.compiling",
    "load_policy": "lpcompile.policy.file",
    "lp_parameters": "lpcompile.quantizers",
    "lpcompile": "lpcompile.api",
    "make_optimizer": "lpcompile.optimizers",
    "original_state_dict": "lpcompile.api",
    "report": "lpcompile.reporting.certificate",
    "telemetry": "lpcompile.watching.session",
}
