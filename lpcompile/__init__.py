"""The front door: lpcompile(model, policy) compiles a model in place; report(model) says what came of it."""

from lpcompile.api import advance, attach, capture_more, lpcompile, original_state_dict
from lpcompile.frontends.leaves.attention_interface import use_lp_attention
from lpcompile.loss_scaler import LossScaler
from lpcompile.policy.file import load_policy
from lpcompile.policy.resolve import Policy
from lpcompile.quantizers import lp_parameters
from lpcompile.reporting.certificate import report

__all__ = [
    "LossScaler", "Policy", "advance", "attach", "capture_more", "load_policy", "lp_parameters", "lpcompile",
    "original_state_dict", "report", "use_lp_attention",
]  # fmt: skip
