"""Changes: what became of the leaves of a compiled model since: replaced, taken out, wrapped, overridden, added, and
passed by. Under strict the next call refuses what the certificate would tell.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lpcompile.compiled import COMPILED, Compiled
from lpcompile.errors import LoweringError
from lpcompile.frontends.install import installed, is_overridden
from lpcompile.frontends.intercept.install import may_write, nameable
from lpcompile.frontends.leaves.find import find_leaves
from lpcompile.frontends.leaves.leaf_forward import LeafForward
from lpcompile.plan import Sight
from lpcompile.policy.describe import classes_of, describe
from lpcompile.policy.rules import Site

AGAIN = "lpcompile(model, policy) again"


def lost_leaves(root: nn.Module, compiled: Compiled) -> Mapping[str, str]:
    """Site -> why it no longer runs as it was compiled. A leaf that only moved, as under a LoRA, still does."""
    running: set[str] = set()
    reasons: dict[str, str] = {}
    for module in root.modules():
        record = installed(module)
        if isinstance(record, LeafForward):
            if "forward" in vars(module):
                reasons |= dict.fromkeys(record.sites, f"its forward was overridden after compiling. Try {AGAIN}")
            running |= record.sites
    modules = dict(root.named_modules())
    for leaf in compiled.leaves:
        if leaf.name in compiled.phase_of(root).products and leaf.name not in running:
            now = modules.get(leaf.path)
            what = "was taken out of the model" if now is None else f"was replaced by a {type(now).__name__}"
            reasons[leaf.name] = f"the module {what} after compiling. Try {AGAIN}"
    return reasons


def uncalled_leaves(root: nn.Module, compiled: Compiled) -> dict[str, str]:
    """Site -> which call passed the leaf by: that of the examples, or all so far that eager code made. Nothing is said
    of what compiled code holds, nor before the first call.
    """
    counts, named = compiled.state.calls, {site.name for site in compiled.sites}
    passed = dict.fromkeys(compiled.uncalled, "not called by the example forward")
    if counts.are_all and compiled.mode == "train" and any(counts.seen(name, "fwd") for name in counts.sites):
        products = compiled.phase_of(root).products
        passed = {leaf.name: "not called so far" for leaf in compiled.leaves if leaf.name in products} | passed
    if counts.are_all:
        passed = _below_overridden(compiled, root) | passed
    return {name: why for name, why in passed.items() if name in named and not counts.seen(name, "fwd")}


def _below_overridden(compiled: Compiled, root: nn.Module) -> dict[str, str]:
    """Site -> the module in which it lies, and whose forward was overridden after compiling: it may go another way."""
    found: dict[str, str] = {}
    sites = {site.name: site.owner or "" for site in compiled.sites}
    sites |= {leaf.name: leaf.path for leaf in compiled.leaves}
    for path, module in root.named_modules():
        if path in compiled.own_forwards or not is_overridden(module):
            continue
        why = f"not called so far: the forward of {path or 'the root'} was overridden after compiling. Try {AGAIN}"
        inside = [name for name, where in sites.items() if f"{where}.".startswith(f"{path}." if path else "")]
        found = dict.fromkeys(inside, why) | found
    return found


def added_writers(root: nn.Module, compiled: Compiled) -> dict[str, str]:
    """Path of a module that came after compiling -> why a product that it writes itself runs as it is. Those alone of
    which the policy in force names some product.
    """
    added = {
        path: module for path, module in root.named_modules()
        if installed(module) is None and may_write(module) and compiled.classes.get(path) != classes_of(module)
    }  # fmt: skip
    named = nameable(compiled.phase_of(root).policy, added, compiled.num_layers)
    return {path: f"the {type(added[path]).__name__} came after compiling. Try {AGAIN}" for path in sorted(named)}


def added_sites(root: nn.Module, compiled: Compiled) -> list[Site]:
    """Leaves that came after compiling and that the policy in force names."""
    known = {site.name for site in compiled.sites}
    modules = dict(root.named_modules())
    leaves = [leaf for leaf in find_leaves(root)[0] if leaf.name not in known and installed(modules[leaf.path]) is None]
    sights = [Sight(leaf.name, leaf.op, leaf.kind, leaf.n, leaf.k, index=leaf.index) for leaf in leaves]
    sites = describe([compiled.site_of(sight) for sight in sights], root, None) if sights else []
    specs = compiled.phase_of(root).policy.resolve(sites).specs
    return [site for site in sites if specs.get(site.name) is not None]


class RefuseChanges:
    """A forward pre-hook of the root, under strict: a call whose modules are others than those of the call before, or
    have a forward of their own, is refused where a named product would not run. A microsecond or two a module.
    """

    def __init__(self) -> None:
        self._held: list[tuple[nn.Module, bool]] = []

    def __call__(self, root: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        held = [(module, "forward" in vars(module)) for module in root.modules()]
        if held == self._held:
            return
        compiled: Compiled = vars(root)[COMPILED]
        changed = {**lost_leaves(root, compiled), **added_writers(root, compiled)}
        changed |= {site.name: f"it came after compiling. Try {AGAIN}" for site in added_sites(root, compiled)}
        if changed:
            name, why = next(iter(changed.items()))
            raise LoweringError(
                f"{name} would run as in the uncompiled model: {why}",
                where="strict",
                expected="every named GEMM to run as its policy says, in every call",
            )
        self._held = held

    def __deepcopy__(self, memo: dict[int, Any]) -> "RefuseChanges":
        return RefuseChanges()

    def __getstate__(self) -> dict[str, Any]:
        return {"_held": []}
