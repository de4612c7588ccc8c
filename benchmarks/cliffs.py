"""Cliffs: forward and backward of one layer under one policy, over the same in fp32, for every layer and policy.

    python -m benchmarks.cliffs [--rows linear conv3x3 ...] [--columns hfp8-1-6-9 ...] [--rounds 5] [--threads 2]
                                [--cpu-time] [--markdown]

A recipe that is fast on a linear layer and a hundred times slower on the first convolution is not usable, so no layer
may stand out. Layers of a row take turns, the uncompiled one among them, and medians are compared. A number with a
star: some product of the layer runs in the reference, rounding by rounding in torch operations. `-`: the policy
refuses the layer.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks._timing import median_ms, show
from lpcompile import lpcompile, report
from runtime.errors import LpError

Layer = Callable[[], tuple[nn.Module, Tensor]]
_RULE = """version: 1
name: {name}
source: a column of benchmarks/cliffs.py
rules:
  - match: {{op: [linear, conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d]}}
    fwd: {{x: {x}, w: {x}, accumulate: {sum}}}
    bwd: {{dy: {dy}, w: {x}, accumulate: {sum}}}
    grad: {{dy: {dy}, x: {x}, accumulate: {sum}}}
"""
_IN_1_6_9 = "{format: dlfloat16, chunk: 64}"
COLUMNS: dict[str, str | tuple[str, str, str]] = {
    "hfp8-1-6-9": ("hfp8-143", "e5m2", _IN_1_6_9),
    "1-6-9": ("dlfloat16", "dlfloat16", _IN_1_6_9),
    "fp16-sums": ("fp16", "fp16", "fp16"),
    "bf16-sums": ("bf16", "bf16", "bf16"),
    "hfp8": "hfp8",
    "bf16": "bf16",
    "int8": "int8",
    "int4": "fqt-4-ptq",
    "stochastic": ("{format: e4m3, rounding: stochastic}", "{format: e5m2, rounding: stochastic}", "fp32"),
}
"""A shipped policy, or x and w, dy, and how sums are made."""


class _Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(128, 128, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lstm(x)[0]
        return y


def _conv(kind: str, size: tuple[int, ...], channels: tuple[int, int], kernel: int, **options: int) -> Layer:
    return lambda: (getattr(nn, kind)(*channels, kernel, **options), torch.randn(size))


def _block(num_in: int, num_out: int, stride: int) -> nn.Module:
    """A residual block as in ResNet-18."""
    main = nn.Sequential(
        nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU(),
        nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False), nn.BatchNorm2d(num_out),
    )  # fmt: skip
    shortcut = nn.Identity() if stride == 1 else nn.Conv2d(num_in, num_out, 1, stride, bias=False)
    return nn.Sequential(_Sum(main, shortcut), nn.ReLU())


class _Sum(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        left, right = (part(x) for part in self.parts)
        y: Tensor = left + right
        return y


def _resnet() -> tuple[nn.Module, Tensor]:
    body = [_block(*sizes) for sizes in ((64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2))]
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    model = nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))
    return model, torch.randn(8, 3, 64, 64)


def _inverted(num_in: int, num_out: int, stride: int, wide: int) -> nn.Module:
    """An inverted residual as in MobileNetV2."""
    main = nn.Sequential(
        nn.Conv2d(num_in, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
        nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
        nn.Conv2d(wide, num_out, 1, bias=False), nn.BatchNorm2d(num_out),
    )  # fmt: skip
    return _Sum(main, nn.Identity()) if stride == 1 and num_in == num_out else main


def _mobilenet() -> tuple[nn.Module, Tensor]:
    sizes = ((16, 24, 2, 96), (24, 24, 1, 144), (24, 32, 2, 144), (32, 32, 1, 192), (32, 64, 2, 192), (64, 64, 1, 384))
    stem = (nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
    model = nn.Sequential(
        *stem, *(_inverted(*each) for each in sizes), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )
    return model, torch.randn(8, 3, 64, 64)


ROWS: dict[str, Layer] = {
    "linear": lambda: (nn.Linear(512, 512), torch.randn(512, 512)),
    "encoder": lambda: (nn.TransformerEncoderLayer(256, 4, 1024, 0.0, batch_first=True), torch.randn(4, 128, 256)),
    "conv3x3": _conv("Conv2d", (8, 64, 28, 28), (64, 64), 3, padding=1),
    "conv1x1": _conv("Conv2d", (8, 64, 28, 28), (64, 128), 1),
    "stride2": _conv("Conv2d", (8, 64, 28, 28), (64, 128), 3, stride=2, padding=1),
    "conv1d": _conv("Conv1d", (8, 128, 256), (128, 128), 3, padding=1),
    "stem7x7": _conv("Conv2d", (8, 3, 64, 64), (3, 64), 7, stride=2, padding=3),
    "transposed": _conv("ConvTranspose2d", (8, 64, 14, 14), (64, 32), 4, stride=2, padding=1),
    "conv3d": _conv("Conv3d", (2, 16, 8, 16, 16), (16, 32), 3, padding=1),
    "grouped8": _conv("Conv2d", (8, 64, 28, 28), (64, 64), 3, padding=1, groups=8),
    "depthwise": _conv("Conv2d", (8, 128, 28, 28), (128, 128), 3, padding=1, groups=128),
    "lstm": lambda: (_Lstm(), torch.randn(8, 32, 128)),
    "resnet": _resnet,
    "mobilenet": _mobilenet,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="layers (default: all)")
    parser.add_argument("--columns", nargs="+", default=list(COLUMNS), choices=list(COLUMNS), help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each contender (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of the process, for a busy machine; with --threads 1, nothing waits"
    )
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    header = ["layer", "fp32 ms", *options.columns]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        policies = {name: _policy(name, Path(folder)) for name in options.columns}
        for row in options.rows:
            rows.append([row, *_measured(ROWS[row], policies, options.rounds, clock)])
            if options.markdown:
                print("|", " | ".join(rows[-1]), "|", flush=True)
    if options.markdown:
        for line in (header, ["---"] * len(header), *rows):
            print("|", " | ".join(line), "|")
    table = Table(*header, title="forward and backward, times fp32; *: some product runs in the reference")
    for line in rows:
        table.add_row(*line)
    show(table)


def _policy(column: str, folder: Path) -> str | Path:
    """The shipped policy, or a file of this column's numbers."""
    numbers = COLUMNS[column]
    if isinstance(numbers, str):
        return numbers
    path = folder / f"{column}.yaml"
    path.write_text(_RULE.format(name=column, x=numbers[0], dy=numbers[1], sum=numbers[2]))
    return path


def _measured(layer: Layer, policies: dict[str, str | Path], rounds: int, clock: Callable[[], float]) -> list[str]:
    """Milliseconds in fp32, then each policy's ratio over it."""
    torch.manual_seed(0)
    model, x = layer()
    contenders, marks = {"": _turn(model, x)}, {}
    for name, policy in policies.items():
        try:
            compiled = lpcompile(copy.deepcopy(model), policy, (x,))
        except LpError:
            continue
        rows = [row for row in report(compiled).gemms if row.backend != "refused"]
        if rows:
            marks[name] = "*" if any(row.backend == "reference" for row in rows) else ""
            contenders[name] = _turn(compiled, x)
    medians = median_ms(contenders, rounds, 1, clock)
    base = medians.pop("")
    ratios = (f"{medians[name] / base:.2f}{marks[name]}" if name in medians else "-" for name in policies)
    return [f"{base:.2f}", *ratios]


def _turn(model: nn.Module, x: Tensor) -> Callable[[], None]:
    x = x.clone().requires_grad_()
    y = model(x)
    dy = torch.randn_like(y)

    def turn() -> None:
        for each in (x, *model.parameters()):
            each.grad = None
        model(x).backward(dy)

    return turn


if __name__ == "__main__":
    main()
