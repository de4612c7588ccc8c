"""Describing sites: what a rule can ask about a product beyond its name, read from the model that holds it."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import nn

from lpcompile.policy.patterns import count_layers, layer_of
from lpcompile.policy.rules import Site


def describe(sites: Sequence[Site], model: nn.Module, called: Collection[str] | None = None) -> list[Site]:
    """The sites with the module that holds each, its classes, a convolution's geometry, and how many layers there are
    where it is: those with parameters. `called`: paths of the leaves that example calls ran; first and last are then
    among these.
    """
    modules = dict(model.named_modules())
    counts = count_layers([path for path, _ in model.named_parameters(remove_duplicate=False)])
    described = []
    for site in sites:
        owner = site.name
        while owner and owner not in modules:
            owner = owner.rpartition(".")[0]
        stem, _ = layer_of(site.name) or ("", 0)
        module = modules[owner]
        site = replace(site, owner=owner, classes=classes_of(module), num_layers=counts.get(stem))
        if site.index is not None and site.op.startswith("conv"):
            sides, groups = getattr(module, "kernel_size", None), getattr(module, "groups", None)
            site = replace(site, kernel=max(sides) if sides else None, groups=groups)
        described.append(site)
    return described if called is None else _renumbered(described, called)


def classes_of(module: nn.Module) -> tuple[str, ...]:
    """Its class and base classes below nn.Module, by name."""
    kinds = type(module).__mro__
    return tuple(kind.__name__ for kind in kinds[: kinds.index(nn.Module)] or kinds[:1])


def _renumbered(sites: Sequence[Site], called: Collection[str]) -> list[Site]:
    counted = [site.name for site in sites if site.index is not None and site.owner in called]
    places = {name: index for index, name in enumerate(counted)}
    return [replace(site, index=places.get(site.name), count=len(counted)) for site in sites]
