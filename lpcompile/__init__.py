"""The front door: lpcompile(model, policy) compiles a model in place; report(model) says what came of it."""

from lpcompile.api import advance, attach, capture_more, lpcompile, original_state_dict
from lpcompile.capture.attention_interface import use_lp_attention
from lpcompile.certificate import report
from lpcompile.policy import Policy
from lpcompile.policy_file import load_policy

__all__ = [
    "Policy", "advance", "attach", "capture_more", "load_policy", "lpcompile", "original_state_dict", "report",
    "use_lp_attention",
]  # fmt: skip
