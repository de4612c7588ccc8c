"""Changes: what became of the leaves of a compiled model since: replaced, taken out, wrapped, overridden, added, and
passed by.
"""

from collections.abc import Mapping

from torch import nn

from lpcompile.compiled import Compiled
from lpcompile.frontends.install import installed
from lpcompile.frontends.leaves.find import find_leaves
from lpcompile.frontends.leaves.leaf_forward import LeafForward
from lpcompile.plan import Sight
from lpcompile.policy.describe import describe
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
        if leaf.name in compiled.phase.products and leaf.name not in running:
            now = modules.get(leaf.path)
            what = "was taken out of the model" if now is None else f"was replaced by a {type(now).__name__}"
            reasons[leaf.name] = f"the module {what} after compiling. Try {AGAIN}"
    return reasons


def uncalled_leaves(compiled: Compiled) -> dict[str, str]:
    """Site -> which call passed the leaf by: that of the examples, or all so far that eager code made. Nothing is said
    of what compiled code holds, nor before the first call.
    """
    counts, named = compiled.state.calls, {site.name for site in compiled.sites}
    passed = dict.fromkeys(compiled.uncalled, "not called by the example forward")
    if counts.are_all and compiled.mode == "train" and any(counts.seen(name, "fwd") for name in counts.sites):
        products = compiled.phase.products
        passed = {leaf.name: "not called so far" for leaf in compiled.leaves if leaf.name in products} | passed
    return {name: why for name, why in passed.items() if name in named and not counts.seen(name, "fwd")}


def added_sites(root: nn.Module, compiled: Compiled) -> list[Site]:
    """Leaves that came after compiling and that the policy in force names."""
    known = {site.name for site in compiled.sites}
    modules = dict(root.named_modules())
    leaves = [leaf for leaf in find_leaves(root)[0] if leaf.name not in known and installed(modules[leaf.path]) is None]
    sights = [Sight(leaf.name, leaf.op, leaf.kind, leaf.n, leaf.k, index=leaf.index) for leaf in leaves]
    sites = describe([compiled.site_of(sight) for sight in sights], root, None) if sights else []
    specs = compiled.phase.policy.resolve(sites).specs
    return [site for site in sites if specs.get(site.name) is not None]
