"""Structure: the few operations of the text that are no lp ops: what a program holds, and torch's own calls.

Declared once, like lp ops in runtime/ops/dialect.py; the parser and the table in docs/ir.md read it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Structure:
    """One operation. Attribute kinds are str, int, bool, list or dict; optional ones may be left out."""

    name: str
    does: str
    """What it stands for, in one sentence."""
    attributes: dict[str, type]
    optional: dict[str, type]
    takes_operands: bool = False
    has_result: bool = False
    has_body: bool = False


STRUCTURES: dict[str, Structure] = {
    each.name: each
    for each in (
        Structure("builtin.module", "A program: its record, its sites, its graphs.", {}, {}, has_body=True),
        Structure(
            "lp.program",
            "The device that kernels are chosen for, and which passes have run.",
            {"device": str, "passes": str},
            {},
        ),
        Structure(
            "lp.site",
            "What the policy says of a GEMM site, why it was refused, and the backend chosen for each role.",
            {"name": str},
            {"spec": str, "refusal": str, "decisions": dict, "fwd": dict, "bwd": dict, "grad": dict},
        ),
        Structure(
            "lp.finding",
            "What a pass found wrong or risky in what the policy says.",
            {"code": str, "where": str, "what": str},
            {"hint": str, "is_wrong": bool},
        ),
        Structure(
            "torch.graph",
            "One graph: the forward of a module, or of a leaf."
            " Its block arguments are the placeholders; `arg_attrs` says what else is known of them.",
            {"sym_name": str, "path": str, "kind": str},
            {"arg_attrs": list},
            has_body=True,
        ),
        Structure(
            "torch.get_attr", "A parameter, buffer or the RunState of the module.", {"target": str}, {}, False, True
        ),
        Structure("torch.call_module", "A call of a child, by its path.", {"target": str}, {"args": str}, True, True),
        Structure(
            "torch.call_method", "A call of a method of the first operand.", {"target": str}, {"args": str}, True, True
        ),
        Structure(
            "torch.call_function", "A call of a function, by its name.", {"target": str}, {"args": str}, True, True
        ),
        Structure("torch.return", "What the graph gives: a flat tuple.", {}, {"args": str}, True),
    )
}
"""`args` is the text of passes/ir/arguments.py; without it the operands are the arguments, one by one."""
