"""The front door: lpcompile(model, policy) compiles a model in place; report(model) says what came of it."""

from lpcompile.api import advance, attach, lpcompile, original_state_dict
from lpcompile.loss_scaler import LossScaler
from lpcompile.policy.file import load_policy
from lpcompile.policy.resolve import Policy
from lpcompile.quantizers import lp_parameters
from lpcompile.reporting.certificate import report

__all__ = [
    "LossScaler", "Policy", "advance", "attach", "load_policy", "lp_parameters", "lpcompile", "original_state_dict",
    "report",
]  # fmt: skip
