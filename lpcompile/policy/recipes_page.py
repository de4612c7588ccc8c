"""The table of recipes: docs/recipes.md, written from the shipped policies.

python -m lpcompile.policy.recipes_page > docs/recipes.md
"""

from lpcompile.policy.file import load_policy, shipped_policies
from lpcompile.policy.resolve import Policy
from lpcompile.policy.rules import Site
from runtime.numerics.specs import ROLES, GemmSpec, LayerSpec, QuantSpec

COLUMNS = (
    "policy", "y = x.w", "dx = dy.w", "dw = dy.x", "sums", "first, last layer", "loss scale", "update", "wire",
    "source",
)  # fmt: skip

_HEAD = """# Recipes

Written from the policy files that come with the package, and compared with them by a test:

    python -m lpcompile.policy.recipes_page > docs/recipes.md

`launch train --policy NAME` trains by one, `lpcompile policy show NAME` says all of it, and `extends: [NAME]` in a file
of yours begins with it. The columns are those of a linear layer between others; convolutions are cast alike unless the
file says otherwise. `~` is stochastic rounding, `/row` one scale per row of the operand's matrix, `/tensor^2` one that
is a power of two. Names of formats are those of [formats.md](formats.md); `ptqB`, `psqB` and `bhqB` are B bits over the
range of a tensor, of each sample, and of samples mixed by block Householder reflections. What a source could not
confirm is said in the head of the file.
"""


def to_markdown() -> str:
    """The whole page."""
    rows = [_cells(load_policy(name)) for name in shipped_policies()]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return _HEAD + "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(policy: Policy) -> list[str]:
    sites = [Site(name, "linear", index, 3, 256, 256) for index, name in enumerate(("first", "middle", "last"))]
    specs = policy.resolve(sites).specs
    first, middle, last = (specs[site.name] for site in sites)
    gemms = [_gemm(middle.role(role)) if middle else "as it is" for role in ROLES]
    sums = "" if middle is None else ", ".join(dict.fromkeys(_sums(middle.role(role)) for role in ROLES))
    ends = "like the others" if first == middle == last else " and ".join(dict.fromkeys(map(_end, (first, last))))
    scale = policy.loss_scale
    loss = "none" if scale.kind == "none" else f"{scale.kind}, {scale.init:g}"
    update = "" if policy.update == type(policy.update)() else str(policy.update)
    wire = f"{policy.wire.format} / {policy.wire.block}" if policy.wire else ""
    return [policy.name, *gemms, sums, ends, loss, update, wire, policy.source]


def _gemm(spec: GemmSpec) -> str:
    return f"{_operand(spec.lhs)} * {_operand(spec.rhs)}"


def _operand(spec: QuantSpec) -> str:
    scale = "" if spec.scale is None or spec.quantizer else f"/{spec.scale.granularity}"
    if scale and spec.scale is not None:
        size = f"[{spec.scale.block[0]}x{spec.scale.block[1]}]" if spec.scale.granularity == "block" else ""
        scale += size + {"amax": "", "pow2": "^2"}.get(spec.scale.rule, f" {spec.scale.rule}")
    learned = f" {spec.quantizer.kind}" if spec.quantizer else ""
    return spec.format + ("~" if spec.is_stochastic else "") + scale + learned


def _sums(spec: GemmSpec) -> str:
    out = "" if spec.out == "fp32" else f", out {spec.out}"
    return f"{spec.accumulator}{out}"


def _end(spec: LayerSpec | None) -> str:
    return "as it is" if spec is None else _gemm(spec.fwd)


if __name__ == "__main__":
    print(to_markdown(), end="")
