"""Mutated policies: each is read, resolves, prints and reads as itself, and compiles, or is an LpError that says where.

Reading one writes nothing, starts nothing and imports nothing.
"""

import random
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from lpcompile import load_policy, lpcompile, report
from lpcompile.errors import LpError
from lpcompile.policy.file import shipped_policies
from lpcompile.policy.resolve import Policy
from lpcompile.policy.rules import Site
from tests.side_effects import recorded_side_effects

ROOT = Path(__file__).parents[3]
SITES = [
    Site("stem", "conv2d", 0, 3, 64, 27),
    Site("layers.0.mlp.up", "linear", 1, 5, 256, 64),
    Site("layers.1.attn.q_proj", "linear", 2, 5, 64, 64),
    Site("layers.1.attn.matmul_0", "matmul", None, 5, None, None),
    Site("head", "linear", 3, 5, 10, 64),
]
_ODD = [
    *(
        "",
        "-1",
        "0",
        "1.5",
        "null",
        "true",
        "~",
        "9" * 20,
        "9" * 5000,
        "[" * 50,
        "{",
        "}",
        "- ",
        ": ",
        "\n",
        "\t",
        "#",
        "'",
    ),
    *('"', "\\", "\ud800", "\0", "é", "&a ", "*a", "<<: ", "!!python/object/apply:os.system", "%", "|", ">", ".inf"),
    *(".nan", "1e400", "0x10", "1:30", "2026-11-30", "re:(a+)+$", "re:(", "[a-", "**", "..", "/etc", "../x.yaml"),
    *(
        "extends",
        "hfp8",
        "fp8-rowwise",
        "layers",
        "not",
        "re:",
        "leave",
        "int3",
        "1-9-9",
        "nvfp4",
        "2-3,-2..",
        ">=64,%16",
    ),
]


def _tokens(text: str) -> list[str]:
    return re.findall(r"[\w.*-]+|\s+|[^\w\s]", text)


def _sources() -> list[list[str]]:
    """Shipped policies and the examples without comments, whole, and each rule of them by itself."""
    folder = ROOT / "examples" / "policies"
    texts = []
    for path in [*shipped_policies().values(), *sorted(folder.glob("*.yaml"))]:
        text = re.sub(r"(?m)^\s*#.*\n|\s+#.*$", "", path.read_text())
        head, _, rules = text.partition("\nrules:\n")
        texts += [text, *(f"{head}\nrules:\n{rule}" for rule in re.findall(r"(?m)^  - .*\n(?:    .*\n)*", rules))]
    return [_tokens(text) for text in texts]


def _mutate(source: Sequence[str], draw: random.Random, vocabulary: Sequence[str]) -> str:
    """One to three of: a token for another, one put in, a stretch left out, doubled, or moved. Of two texts in three
    only words change, so that YAML stays YAML.
    """
    tokens = list(source)
    is_yaml = draw.random() < 0.67
    words, odd = ([each for each in some if _is_word(each) or not is_yaml] for some in (vocabulary, _ODD))
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(tokens))
        other = draw.choice(odd if draw.random() < 0.3 else words)
        length = draw.choice([1, 1, 2, 5, 20])
        match 0 if is_yaml else draw.randrange(1, 6):
            case 0:
                places = [at for at, token in enumerate(tokens) if _is_word(token)]
                tokens[draw.choice(places) if places else place] = other
            case 1:
                tokens[place] = other
            case 2:
                tokens.insert(place, other)
            case 3:
                del tokens[place : place + length]
            case 4:
                tokens[place:place] = tokens[place : place + length]
            case 5:
                target = draw.randrange(len(tokens))
                tokens[target:target] = tokens[place : place + length]
        tokens = tokens or [other]
    return "".join(tokens)


def _is_word(token: str) -> bool:
    return re.fullmatch(r"\w[\w.*-]*", token) is not None


class _Small(nn.Module):
    """A product of each kind that rules tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])
        self.head = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2)[:, :, :32]
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x @ x.transpose(1, 2) @ x)


def _run(policy: Policy) -> None:
    """Compile the small model and train a step."""
    torch.manual_seed(0)
    model = lpcompile(_Small(), policy)
    model(torch.randn(2, 4, 6, 6)).sum().backward()
    report(model).to_text()


def _read_mutations(folder: Path, count: int, seed: int, run_every: int = 20) -> tuple[int, int]:
    """How many of `count` mutated policies were read, and how many of those trained a step: one of `run_every`. One of
    ten is printed and read again.
    """
    draw, sources = random.Random(seed), _sources()
    vocabulary = sorted({token for tokens in sources for token in tokens})
    num_read, num_run, path = 0, 0, folder / "policy.yaml"
    for number in range(count):
        path.write_bytes(_mutate(draw.choice(sources), draw, vocabulary).encode("utf-8", "surrogatepass"))
        try:
            with recorded_side_effects() as effects:
                policy = load_policy(path)
                for _, phase in policy.phases:
                    phase.resolve(SITES)
                policy.describe()
            num_read += 1
            if num_read % 10 == 0:
                path.write_text(policy.to_yaml())
                assert load_policy(path).to_yaml() == policy.to_yaml()
            if num_read % run_every == 0:
                _run(policy)
                num_run += 1
        except LpError:
            pass
        except Exception as error:
            raise AssertionError(f"mutation {number} of seed {seed}: {type(error).__name__}: {error}") from error
        assert effects == [], f"mutation {number} of seed {seed}: {effects}"
    return num_read, num_run


@pytest.fixture(autouse=True)
def _warnings_are_let_be() -> None:
    warnings.simplefilter("ignore")


def test_a_side_effect_is_seen(tmp_path: Path) -> None:
    """The check can fail."""
    with recorded_side_effects() as effects:
        (tmp_path / "written").write_text("x")
        exec("1")
    assert [each.partition(" ")[0] for each in effects] == ["open", "exec"]


def test_mutated_policies_raise_no_other_error(tmp_path: Path) -> None:
    num_read, num_run = _read_mutations(tmp_path, 300, seed=0, run_every=5)
    assert num_read > 5
    assert num_run


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_mutated_policies_raise_no_other_error(seed: int, tmp_path: Path) -> None:
    num_read, num_run = _read_mutations(tmp_path, 10_000, seed)
    print(f"seed {seed}: 10,000 mutated policies, {num_read} of them read, {num_run} of those trained a step")
