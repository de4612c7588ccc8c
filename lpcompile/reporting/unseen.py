"""Unseen: modules that may multiply by a matrix of their own in a way that only a call shows, and no call has yet."""

from torch import nn

from lpcompile.compiled import Compiled
from lpcompile.frontends.intercept.install import find_writers, nameable


def unseen_products(root: nn.Module, compiled: Compiled) -> dict[str, str]:
    """Path of a module that is no leaf, such as a router of experts -> what becomes of its products."""
    owners = {site.owner for site in compiled.sites}
    modules = dict(root.named_modules())
    paths = [
        path
        for path in find_writers(root, compiled.leaves)
        if path not in (compiled.called or ()) and path not in owners and _holds_matrix(modules[path])
    ]
    writers = {path: modules[path] for path in paths}
    named = {path for phase in compiled.phases for path in nameable(phase.policy, writers, compiled.num_layers)}
    return {path: _NAMED if path in named else _LEFT for path in paths}


def _holds_matrix(module: nn.Module) -> bool:
    """Whether a parameter of its own may be multiplied by; a table that is looked up is not."""
    return not isinstance(module, nn.Embedding) and any(
        parameter is not None and parameter.dim() >= 2 for parameter in module._parameters.values()
    )


_NAMED = "a rule names what it may multiply by its own weight, which a call shows; give example inputs"
_LEFT = "no rule names what it may multiply by its own weight: left alone"
