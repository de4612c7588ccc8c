"""A model that is not compiled, checked against a policy: for tests of checks and of rules alone."""

from torch import nn

from lpcompile.api import sight_of
from lpcompile.compiled import Compiled
from lpcompile.frontends.leaves.find import find_leaves
from lpcompile.plan import PhaseCode
from lpcompile.policy.resolution import Resolution
from lpcompile.policy.resolve import Policy
from lpcompile.reporting.checks import check_policy
from passes.finding import Finding
from runtime.state import RunState


def check_model(model: nn.Module, policy: Policy) -> tuple[Resolution, list[Finding]]:
    """What a policy means for the leaves of a model, and what of it does not fit them; nothing is run or changed.

    Of a policy with a schedule, ask each phase. How long GRAD's sums are, only a recorded call says.
    """
    leaves, _ = find_leaves(model)
    compiled = Compiled(policy, RunState(), [], [PhaseCode.of(0, policy, "cpu")], leaves, {}, "train", False)
    compiled.add_all(model, [sight_of(model, leaf, None) for leaf in leaves])
    phase = compiled.phase
    found = check_policy(model, leaves, compiled.sites, policy, phase.resolution)
    return phase.resolution, found + phase.program.findings
