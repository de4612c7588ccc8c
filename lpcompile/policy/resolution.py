"""Resolution: what the rules of a policy mean for the sites of one model, and which rule decided what.

Rules resolve per role: the first rule that matches a site and sets `fwd` decides the site's fwd; likewise bwd and grad.
A rule that leaves decides every role that is open. A role that no matching rule sets is fp32; a site for which no role
is set is left alone (None).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lpcompile.policy.patterns import count_layers, layer_of
from lpcompile.policy.rules import Rule, Site
from runtime.numerics.specs import ROLES, GemmSpec, Keep, LayerSpec, Role


@dataclass(frozen=True)
class RuleUse:
    """What became of one rule in one model."""

    label: str
    """Where it is written: `policy.yaml:12: rules[1]`."""
    condition: str
    """What it matches, in words."""
    sites: tuple[str, ...]
    """The sites it matches."""
    num_rows: int
    """GEMMs (a role of a site each) that it decides."""
    deciders: tuple[str, ...]
    """Labels of the rules above it that decided rows which it sets as well."""
    is_told: bool
    """Whether it is a fault that it decides nothing: not of a shipped rule, and not of one that another file's rules,
    which extend it, come before.
    """
    is_waiting: bool = False
    """Whether a call may yet show something that it decides."""

    @property
    def is_idle(self) -> bool:
        """Whether it decides nothing, which is a fault."""
        return self.is_told and not self.num_rows


@dataclass(frozen=True)
class Resolution:
    """What a policy means for the sites of one model."""

    specs: dict[str, LayerSpec | None]
    """Site name -> its three GEMMs; None: no rule sets any role, or one leaves it; the op is left alone."""
    rule_of: dict[str, dict[Role, str]]
    """Site name -> role -> the rule that decided it; a role that no rule sets is not in it."""
    rules: list[RuleUse] = field(default_factory=list)
    """Of each rule of the policy, in order, what it decided."""


def resolve(rules: Sequence[Rule], sites: Sequence[Site], keep: Keep = "grid") -> Resolution:
    """The LayerSpec of each site under `rules`, and what became of each rule. Layers of sites that `describe` did not
    see are counted among these.
    """
    labels = [rule._origin.text or f"rules[{index}]" for index, rule in enumerate(rules)]
    counts = count_layers([site.name for site in sites])
    sites = [_counted(site, counts) for site in sites]
    matching = {site.name: [i for i, rule in enumerate(rules) if rule.match.matches(site)] for site in sites}
    specs: dict[str, LayerSpec | None] = {}
    rule_of: dict[str, dict[Role, str]] = {}
    decided = [0] * len(rules)
    above: list[dict[int, None]] = [{} for _ in rules]
    for name, indices in matching.items():
        gemms: dict[Role, GemmSpec] = {}
        rule_of[name] = {}
        for role in ROLES:
            setting = [index for index in indices if rules[index].decides(role)]
            for index in setting[:1]:
                decided[index] += 1
                rule_of[name][role] = labels[index]
                if gemm := rules[index].role(role):
                    gemms[role] = gemm.spec()
            for index in setting[1:]:
                above[index][setting[0]] = None
        specs[name] = LayerSpec(**gemms, keep=keep) if gemms else None
    uses = [
        RuleUse(
            label=labels[index],
            condition=str(rule.match),
            sites=tuple(name for name, indices in matching.items() if index in indices),
            num_rows=decided[index],
            deciders=tuple(labels[each] for each in above[index]),
            is_told=not rule._origin.is_shipped
            and all(rules[each]._origin.file == rule._origin.file for each in above[index]),
        )
        for index, rule in enumerate(rules)
    ]
    return Resolution(specs, rule_of, uses)


def _counted(site: Site, counts: Mapping[str, int]) -> Site:
    found = layer_of(site.name) if site.num_layers is None else None
    return site if found is None else replace(site, num_layers=counts[found[0]])
