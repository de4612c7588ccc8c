"""Where scopes lie: which modules may write products, and which of them enter the mode."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lpcompile.compiled import Compiled
from lpcompile.frontends.install import install
from lpcompile.frontends.intercept import products as _runners  # noqa: F401  fills the table of runners
from lpcompile.frontends.intercept.look import Seen
from lpcompile.frontends.intercept.scope import Scope
from lpcompile.frontends.intercept.weight_reads import reads_a_matrix_below
from lpcompile.frontends.leaves.find import Leaf, is_composite, is_of_leaf_kind
from lpcompile.policy.describe import classes_of
from lpcompile.policy.patterns import layer_of
from lpcompile.policy.resolve import Policy
from lpcompile.policy.rules import Site
from passes.ir.program import STATE


def find_writers(model: nn.Module, leaves: Sequence[Leaf]) -> list[str]:
    """Paths of the modules whose forward may write products as operations: all but leaves and torch's own layers."""
    taken = {leaf.path for leaf in leaves}
    inside: tuple[str, ...] = ()
    paths = []
    for path, module in model.named_modules():
        if path in taken and is_composite(module):
            inside += (f"{path}." if path else "",)
        elif path not in taken and not (inside and path.startswith(inside)) and may_write(module):
            paths.append(path)
    return paths


def may_write(module: nn.Module) -> bool:
    """Whether the forward of a module may multiply, other than by its children."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return (
        "forward" in vars(module)
        or is_of_leaf_kind(module)
        or not type(module).__module__.startswith("torch.nn.modules.")
    )


def install_scopes(model: nn.Module, compiled: Compiled, writers: Sequence[str], seen: Seen | None) -> bool:
    """Give every writer a scope, if the policy may name a product of one of them; False if it names none."""
    modules = dict(model.named_modules())
    entrances = _entrances(compiled, {path: modules[path] for path in writers}, seen)
    for path in writers if entrances else ():
        install(modules[path], Scope(path, compiled, path in entrances))
        modules[path].__dict__[STATE] = compiled.state
    return bool(entrances)


def _entrances(compiled: Compiled, writers: Mapping[str, nn.Module], seen: Seen | None) -> set[str]:
    """Of the modules that were seen, those that write a named product; of the others, those that might."""
    policies = [phase.policy for phase in compiled.phases]
    named = {name for phase in compiled.phases for name in phase.program.specs}
    found = {path for name, path in seen.writer.items() if name in named} if seen else set()
    unseen = {path: module for path, module in writers.items() if seen is None or path not in seen.calls}
    return found | {path for policy in policies for path in nameable(policy, unseen, compiled.num_layers)}


def nameable(policy: Policy, writers: Mapping[str, nn.Module], num_layers: Mapping[str, int]) -> set[str]:
    """Those of which a rule names some product, were they to write one. Products with a weight are looked for where the
    module itself holds a matrix, or reads one of its children's.
    """
    sites = {path: possible_sites({path: module}, num_layers) for path, module in writers.items()}
    specs = policy.resolve([site for each in sites.values() for site in each]).specs
    return {path for path, each in sites.items() if any(specs[site.name] is not None for site in each)}


def possible_sites(writers: Mapping[str, nn.Module], num_layers: Mapping[str, int]) -> list[Site]:
    """Products that modules might write, to ask a policy about before any is seen."""
    sites = []
    for path, module in writers.items():
        has_matrix = any(p is not None and p.dim() >= 2 for p in module._parameters.values())
        has_matrix = has_matrix or reads_a_matrix_below(module)
        layers = num_layers.get((layer_of(path) or ("", 0))[0])
        for name, op in (*_PRODUCTS, *(_WEIGHTED if has_matrix else ())):
            sites.append(
                Site(f"{path}.{name}" if path else name, op, None, 0, None, None, classes_of(module), path, layers)
            )
    return sites


_NUMBERS = range(4)
_MULTIHEAD = "multi_head_attention_forward_0"
_PRODUCTS = (
    *((f"{stem}_{number}", "matmul") for stem in ("matmul", "einsum", "addmm", "baddbmm") for number in _NUMBERS),
    *((f"einsum_{number}.{pair}", "matmul") for number in _NUMBERS for pair in (0, 1)),
    *((f"sdpa_{number}.{part}", "matmul") for number in _NUMBERS for part in ("qk", "pv")),
    *((f"{_MULTIHEAD}.{part}", "matmul") for part in ("qk", "pv")),
)
_WEIGHTED = (
    *((f"{_MULTIHEAD}.{part}", "linear") for part in ("in_proj", "out_proj")),
    *((f"{stem}_{number}", "linear") for stem in ("linear", "grouped_mm") for number in _NUMBERS),
    *((f"{op}_{number}", op) for op in ("conv1d", "conv2d", "conv3d") for number in _NUMBERS),
    *((f"conv_transpose{dims}d_{number}", f"conv_transpose{dims}d") for dims in (1, 2, 3) for number in _NUMBERS),
)
