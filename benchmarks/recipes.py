"""A training step by each recipe, as ratios over fp32's, and of a bf16 model over its own, in one run.

    python -m benchmarks.recipes [NAME...] [--rounds 5] [--threads 2] [--markdown]

Forward, backward and update of the GPT of d 512 (4 layers, 4 x 128 tokens), eager. What a policy says of the update is
run too: momentum SGD or AdamW by lpcompile.make_optimizer; torch's AdamW else. Goals are those that the project set.
`hopper-fp8` is fp8-rowwise with the sums of that GPU in all three GEMMs. Contenders take turns; medians are compared.
"""

import argparse
import copy
import warnings
from collections import Counter
from collections.abc import Callable

import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks._timing import median_ms, show
from benchmarks.training_step import SHAPES, make_model
from lpcompile import Policy, load_policy, lpcompile, make_optimizer, report
from lpcompile.policy.file import shipped_policies
from runtime.numerics.specs import ROLES

SHAPE = SHAPES[1]
GOALS = {
    "hfp8-2019": 2.0, "fp8-2018": 2.2, "int4-fp4-2020": 1.3, "fqt-5-psq": 1.3, "mxfp8": 1.3, "nvfp4": 1.3,
    "quartet2": 1.3, "int8-switchback": 0.6, "hopper-fp8": 4.0, "hfp8 of a bf16 model": 1.15,
}  # fmt: skip
"""Times the step of fp32, or of the bf16 model."""
OF_BF16 = "hfp8 of a bf16 model"
ALIKE = ("fqt-4", "fqt-6", "fqt-7", "fqt-8", "fp32")
"""Shipped policies that differ from a row that is measured in a number of bits alone, and the base itself."""
BY_SGD = ("fp8-2018", "dlfloat16", "hfp8-2019")
"""Recipes whose source trains by momentum SGD."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shipped = [name for name in shipped_policies() if not name.startswith(ALIKE)]
    known = [*shipped, "hopper-fp8", OF_BF16]
    parser.add_argument("names", nargs="*", help="rows to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contender (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--markdown", action="store_true", help="print the table as docs/performance.md has it")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no row {unknown[0]!r}: known are {', '.join(known)}")
    torch.set_num_threads(options.threads)
    model = make_model(SHAPE)
    tokens = torch.randint(0, 256, (SHAPE.batch, SHAPE.context), generator=torch.Generator().manual_seed(0))
    steps: dict[str, Callable[[], object]] = {
        "fp32": _step(copy.deepcopy(model), tokens),
        "bf16 model": _step(copy.deepcopy(model).bfloat16(), tokens),
    }
    runs = dict.fromkeys(steps, "")
    for name in options.names or known:
        steps[name], runs[name] = _recipe(name, copy.deepcopy(model), tokens)
    _print(median_ms(steps, options.rounds, warmups=1), runs, options.markdown)


def _recipe(name: str, model: nn.Module, tokens: Tensor) -> tuple[Callable[[], object], str]:
    """A step of the recipe, and what its GEMMs run by."""
    call = {"input_ids": tokens, "labels": tokens}
    if name == OF_BF16:
        policy = _with(load_policy("hfp8"), out="bf16")
        model = model.bfloat16()
    elif name == "hopper-fp8":
        policy = _with(load_policy("fp8-rowwise"), accumulate="hopper-fp8")
    else:
        policy = load_policy(name).over(100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a loss scale that nothing applies: the time is the same
        lpcompile(model, policy, example_kwargs=call)
        kinds = Counter(row.fidelity for row in report(model).gemms)
        kind = "sgd" if name in BY_SGD else "adamw"
        is_plain = policy.update == type(policy.update)() and kind == "adamw"
        optimizer = None if is_plain else make_optimizer(model, kind, lr=1e-3)
        step = _step(model, tokens, optimizer)
        step()
    return step, ", ".join(f"{count} {fidelity}" for fidelity, count in kinds.items())


def _with(policy: Policy, **keys: str) -> Policy:
    """The policy with these keys in every role of every rule."""
    plain = [rule.plain() for rule in policy.rules]
    rules = [{key: {**value, **keys} if key in ROLES else value for key, value in rule.items()} for rule in plain]
    return Policy.model_validate({"name": policy.name, "rules": rules})


def _step(model: nn.Module, tokens: Tensor, optimizer: torch.optim.Optimizer | None = None) -> Callable[[], None]:
    update = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        update.step()
        update.zero_grad()

    return step


def _print(medians: dict[str, float], runs: dict[str, str], as_markdown: bool) -> None:
    columns = ("step", "ms", "x fp32", "goal", "GEMMs")
    rows = []
    for name, median in medians.items():
        base = medians["bf16 model" if name == OF_BF16 else "fp32"]
        over = " of the bf16 model" if name == OF_BF16 else ""
        goal = f"{GOALS[name]:.2f}" if name in GOALS else ""
        rows.append((name, f"{median:.0f}", f"{median / base:.2f}{over}", goal, runs[name]))
    if as_markdown:
        for row in (columns, ["---"] * len(columns), *rows):
            print(f"| {' | '.join(row)} |")
        show()
        return
    table = Table(*columns, title=f"{SHAPE.layers} layers, d {SHAPE.d}, {SHAPE.batch} x {SHAPE.context} tokens")
    for row in rows:
        table.add_row(*row)
    show(table)


if __name__ == "__main__":
    main()
