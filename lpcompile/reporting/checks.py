"""Checks: what of a policy does not fit the model at hand, found before anything runs.

    rule-matches-nothing   wrong   no GEMM of the model is what the rule is for
    policy-names-nothing   wrong   the same of all rules of a shipped policy together
    rule-decides-nothing   wrong   rules above it decide all that it sets
    unsigned-operand       risk    a format without negative values, for what has or may have some
    rounded-again          risk    a result in fp32 leaves a layer of a bf16 or fp16 model in that dtype
    tied-weights           wrong   two layers share one weight and cast it differently
    weight-vanishes        wrong   every element of a weight rounds to zero: no scale, or none so small
    weight-mostly-zero     risk    more than half of the elements that are not zero do
    weight-saturates       risk    a weight goes beyond the largest value of its format, which has no scale
    block-vanishes         risk    the scale of a block is too small for the format of scales, so that the block is 0

What is said of sums (accumulator-swamps, -drifts, -saturates, -open) is found by the pass choose-accumulator.
"""

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from lpcompile.frontends.leaves.find import Leaf
from lpcompile.policy.patterns import REGEX, layer_of
from lpcompile.policy.resolution import Resolution
from lpcompile.policy.resolve import Policy
from lpcompile.policy.rules import Rule, Site
from passes.finding import Finding, names_of
from runtime.numerics import encode_blocks
from runtime.numerics.block_casts import block_amax
from runtime.numerics.block_formats import get_block_format
from runtime.numerics.format_kinds import FloatFormat
from runtime.numerics.formats import get_format
from runtime.numerics.scaling import MIN_SCALE
from runtime.numerics.specs import ROLES, LayerSpec, QuantSpec


def check_policy(
    model: nn.Module, leaves: Sequence[Leaf], sites: Sequence[Site], policy: Policy, resolution: Resolution
) -> list[Finding]:
    """Every finding of the table above, for one phase of a policy. Reads each weight that is cast, once or twice."""
    weights = _weights(model, leaves)
    return [
        *_idle_rules(policy, sites, resolution),
        *_rounded_again(model, policy, resolution),
        *_unsigned(policy, resolution),
        *_tied(weights, resolution),
        *_outside(weights, resolution),
    ]


def _weights(model: nn.Module, leaves: Sequence[Leaf]) -> dict[str, nn.Parameter]:
    """Site -> weight, of the leaves that are one GEMM with its own weight."""
    weights = {leaf.name: model.get_submodule(leaf.path)._parameters.get("weight") for leaf in leaves if not leaf.part}
    return {name: weight for name, weight in weights.items() if weight is not None}


def _idle_rules(policy: Policy, sites: Sequence[Site], resolution: Resolution) -> Iterator[Finding]:
    for rule, use in zip(policy.rules, resolution.rules):
        if not use.is_idle:
            continue
        if not use.sites:
            what = f"({use.condition}) matched none of the {len(sites)} GEMMs"
            yield Finding("rule-matches-nothing", use.label, what, _what_would_match(rule, sites), is_wrong=True)
        else:
            above = ", ".join(use.deciders)
            what = f"({use.condition}) decides nothing: of its {len(use.sites)} GEMMs every role is decided above it"
            yield Finding("rule-decides-nothing", use.label, what, f"it before {above}, or not at all", is_wrong=True)
    setting = [use for rule, use in zip(policy.rules, resolution.rules) if not rule.leave]
    if setting and not any(use.num_rows or use.is_idle or use.is_waiting for use in setting):
        what = f"none of its rules matched any of the {len(sites)} GEMMs"
        ops = ", ".join(sorted({site.op for site in sites})) or "what it multiplies: no GEMM was found"
        hint = f"a file with `extends: [{policy.name}]` and a rule for {ops}"
        yield Finding("policy-names-nothing", policy.name, what, hint, is_wrong=True)


def _what_would_match(rule: Rule, sites: Sequence[Site]) -> str:
    """The products under a module that was named, the nearest names, or the ops, classes and layers that there are."""
    match, names = rule.match, [site.name for site in sites]
    ops = sorted({site.op for site in sites})
    if match.op and not set(match.op) & set(ops):
        more = "; products of activations are found with example_inputs" if "matmul" in match.op else ""
        return f"an op of this model: {', '.join(ops)}{more}"
    for pattern in match.name if match.name != ("*",) else ():
        if not pattern.startswith(REGEX) and (under := fnmatch.filter(names, f"{pattern}.*")):
            return f'"{pattern}.*" for the products under it: {_some(under)}'
        if experts := _experts_like(pattern, names):
            return f"{experts}: all experts of a module are one product, with one weight"
        wanted = pattern.removeprefix(REGEX).replace("*", "").strip(".")
        tails = {name.rpartition(".")[2]: name for name in reversed(names)}
        close = get_close_matches(wanted, [*names, *tails], n=3, cutoff=0.6)
        if close:
            return "a name such as " + ", ".join(dict.fromkeys(tails.get(name, name) for name in close))
    if match.name != ("*",):
        return f"lpcompile policy check FILE --model MODEL, which lists the GEMMs of a model: {_some(names)}"
    if match.class_ and (kinds := sorted({site.classes[0] for site in sites if site.classes})):
        return f"a class of this model: {_some(kinds)}"
    if match.layers and not any(layer_of(name) for name in names):
        return "a condition on names: no path of this model has a number"
    return "a wider condition"


def _experts_like(pattern: str, names: Sequence[str]) -> str:
    """The products of fused experts, where a pattern speaks of one expert by number."""
    found = [name for name in names if ".experts." in name and not re.search(r"\.experts\.[0-9]", name)]
    return _some(found) if re.search(r"\.experts\.[0-9]", pattern) else ""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _rounded_again(model: nn.Module, policy: Policy, resolution: Resolution) -> Iterator[Finding]:
    dtypes = {parameter.dtype for parameter in model.parameters()} & {torch.bfloat16, torch.float16}
    for rule, use in zip(policy.rules, resolution.rules):
        roles = [role for role in ROLES if (gemm := rule.role(role)) and "out" in gemm.model_fields_set]
        stated = [role for role in roles if (gemm := rule.role(role)) and gemm.out == "fp32"]
        if dtypes and stated and use.num_rows and not rule._origin.is_shipped:
            dtype = str(min(dtypes, key=str)).removeprefix("torch.")
            what = f"out: fp32, and the model's tensors are {dtype}: a result leaves the layer rounded to {dtype}"
            yield Finding("rounded-again", use.label, what, f"a model in fp32, or out: {_SHORT[dtype]} to say it")


_SHORT = {"bfloat16": "bf16", "float16": "fp16"}


def _unsigned(policy: Policy, resolution: Resolution) -> Iterator[Finding]:
    """Gradients have both signs, and so may activations; what a weight has is looked at in `_misfit`."""
    for rule, use in zip(policy.rules, resolution.rules):
        for role in ROLES if use.num_rows else ():
            gemm = rule.role(role)
            for key in ("x", "dy"):
                operand = getattr(gemm, key, None)
                if operand is None or not operand.spec().is_elementwise or get_format(operand.format).min < 0:
                    continue
                what = f"{role} {key}: {operand.format} has no negative values: those of {key} become 0"
                hint = "int8, uint8:zero=128, or a rule for what follows a relu alone"
                yield Finding("unsigned-operand", use.label, what, hint)


def _tied(weights: dict[str, nn.Parameter], resolution: Resolution) -> Iterator[Finding]:
    sharing: dict[int, list[str]] = defaultdict(list)
    for name, weight in weights.items():
        sharing[id(weight)].append(name)
    for names in sharing.values():
        casts: dict[str, str] = {}
        for name in names:
            casts.setdefault(_print_casts(resolution.specs.get(name)), name)
        if len(casts) > 1:
            said = (f"as {cast} in {name} ({_rules_of(resolution, name)})" for cast, name in casts.items())
            what = f"they share one weight and cast it differently: {', '.join(said)}"
            yield Finding("tied-weights", names_of(names), what, "one rule that matches them all", is_wrong=True)


def _print_casts(spec: LayerSpec | None) -> str:
    if spec is None:
        return "it is"
    fwd, bwd = spec.fwd.rhs, spec.bwd.rhs
    return f"`{fwd}`" if fwd == bwd else f"`{fwd}` forward, `{bwd}` backward"


def _rules_of(resolution: Resolution, name: str) -> str:
    return ", ".join(dict.fromkeys(resolution.rule_of.get(name, {}).values())) or "no rule"


@dataclass(frozen=True)
class _Misfit:
    code: str
    what: str
    hint: str
    is_wrong: bool = False


def _outside(weights: dict[str, nn.Parameter], resolution: Resolution) -> Iterator[Finding]:
    """One finding per cast and code, with the numbers of the first weight."""
    found: dict[tuple[str, QuantSpec], tuple[_Misfit, list[str]]] = {}
    for name, weight in weights.items():
        spec = resolution.specs.get(name)
        if spec is None or type(weight) is not nn.Parameter or weight.is_meta or not weight.numel():
            continue  # partitioned away, or a tensor of another kind: nothing to look at
        if not weight.is_floating_point():
            continue  # which annotate refuses
        for cast in dict.fromkeys((spec.fwd.rhs, spec.bwd.rhs)):
            if misfit := _misfit(weight.detach(), cast):
                found.setdefault((misfit.code, cast), (misfit, []))[1].append(name)
    for (code, _), (misfit, names) in found.items():
        yield Finding(code, names_of(names), misfit.what, misfit.hint, misfit.is_wrong)


def _misfit(w: Tensor, cast: QuantSpec) -> _Misfit | None:
    if cast.is_identity or cast.is_range or cast.format in ("fp32", "bf16"):  # the range of any weight
        return None
    smallest, largest = torch.aminmax(w)
    amax = max(-float(smallest), float(largest))
    if not 0 < amax < float("inf"):
        return None
    if cast.transform is not None:
        return None  # another weight is cast
    if cast.is_block:
        return _misfit_of_blocks(w, amax, cast)
    row = get_format(cast.format)
    if smallest < 0 and row.min >= 0:
        share = float((w < 0).float().mean())
        what = f"{share:.0%} of the weights are negative, and become 0: {cast.format} has no negative values"
        return _Misfit("unsigned-operand", what, "int8, or uint8:zero=128", is_wrong=share == 1)
    if cast.scale is not None:
        if amax / row.max >= MIN_SCALE:
            return None
        what = f"the largest weight, {amax:.3g}, needs a scale of {amax / row.max:.3g}, and 2^-126 is the smallest"
        return _Misfit("weight-vanishes", what, "another unit for the weight", is_wrong=True)
    if amax > row.max:
        what = f"the largest weight, {amax:.3g}, is beyond {cast.format}'s {row.max:.3g}, and there is no scale"
        return _Misfit("weight-saturates", what, "scale: {granularity: row}")
    if cast.rounding == "stochastic":
        return None
    edge = row.tiny if cast.rounding == "toward_zero" else row.tiny / 2
    is_zero = w.abs() < edge
    share = float(is_zero.sum() - (w == 0).sum()) / max(1, int((w != 0).sum()))
    if share <= 0.5:
        return None
    what = f"{share:.0%} of the elements round to 0: they are below {edge:.3g}, as {cast.format} has no scale here"
    code = "weight-vanishes" if share == 1 else "weight-mostly-zero"
    return _Misfit(code, f"{what} (largest weight {amax:.3g})", "scale: {granularity: row}", is_wrong=share == 1)


def _misfit_of_blocks(w: Tensor, amax: float, cast: QuantSpec) -> _Misfit | None:
    row = get_block_format(cast.format)
    scale = get_format(row.scale)
    if not row.is_two_level:
        if amax / row.element_max >= scale.tiny:
            return None
        what = f"the largest weight, {amax:.3g}, needs a scale below {row.scale}'s smallest, {scale.tiny:.3g}"
        return _Misfit("weight-vanishes", what, "another unit for the weight", is_wrong=True)
    if w.dim() != 2 or not isinstance(scale, FloatFormat):
        return None
    # FWD and BWD lay the blocks along different axes of the weight
    num_zero, num_blocks = max(_vanishing_blocks(lanes, cast.format) for lanes in (w.float(), w.float().t()))
    if not num_zero:
        return None
    what = f"{num_zero} of {num_blocks} blocks become 0: {row.scale} has no scale that small beside one for {amax:.3g}"
    return _Misfit("block-vanishes", what, "mxfp4, whose scales have the range of fp32")


def _vanishing_blocks(lanes: Tensor, format: str) -> tuple[int, int]:
    """How many blocks that hold something but zeros get the scale 0, of how many."""
    codes, amax = encode_blocks(lanes, format).scales, block_amax(lanes, get_block_format(format))
    return int(((codes == 0) & (amax > 0)).sum()), codes.numel()
