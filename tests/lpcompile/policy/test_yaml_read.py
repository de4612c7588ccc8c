"""Hostile and mistaken files: one sentence each, before anything is built from them; the same for a run's config."""

from pathlib import Path

import pytest

from launch.training.config import ConfigError, load_config
from lpcompile.errors import LpError
from lpcompile.policy.file import load_policy

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(9 * ['*' + before])}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{y{name}: *{before}, z{name}: *{before}, <<: *{before}}}\n"
    for before, name in zip("abcdefghijklmnop", "bcdefghijklmnopq")
)
HOSTILE = [
    (BOMB, "too many values"),
    (MERGES, "too many values"),
    ("name: !!bool maybe\n", "!!bool is read as a tag"),
    ('name: !!int ""\n', "!!int is read as a tag"),
    ("name: !!timestamp x\n", "!!timestamp is read as a tag"),
    ("name: !!float [1]\n", "!!float is read as a tag"),
    (f"name: {'[' * 900}{']' * 900}\n", "nested too deeply"),
    ("".join(f"{' ' * depth}a:\n" for depth in range(900)), "nested too deeply"),
    (f"rules: [{{match: {{shape: {{k: {'9' * 5000}}}}}, fwd: {{}}}}]\n", "a number of 5000 characters"),
    (f"name: 0x{'f' * 5000}\n", "a number of 5002 characters"),
    ("x" * (2 << 20), "too long"),
]


@pytest.mark.parametrize(("text", "sentence"), HOSTILE, ids=[sentence for _, sentence in HOSTILE])
def test_a_hostile_file_is_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(LpError, match=sentence) as caught:
        load_policy(path)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=sentence):
        load_config({}, path)


def test_a_bound_of_5000_digits_as_text(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(f'rules: [{{match: {{shape: {{k: ">={"9" * 5000}"}}}}, fwd: {{}}}}]\n')
    with pytest.raises(LpError, match="is not a bound") as caught:
        load_policy(path)
    assert len(str(caught.value)) < 1000


def test_a_chain_of_300_files(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    (tmp_path / "300.yaml").write_text("rules: []\n")
    with pytest.raises(LpError, match="a chain of more than 32 files"):
        load_policy(tmp_path / "0.yaml")


def test_a_diamond_of_30_levels_reads_each_file_once(tmp_path: Path) -> None:
    for number in range(30):
        for side in "ab":
            (tmp_path / f"{side}{number}.yaml").write_text(f"extends: [a{number + 1}.yaml, b{number + 1}.yaml]\n")
    for side in "ab":
        (tmp_path / f"{side}30.yaml").write_text("rules: [{fwd: {x: e4m3}}]\n")
    assert len(load_policy(tmp_path / "a0.yaml").rules) == 1


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800", "a/" * 3000])
def test_a_name_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    for source in (name, Path(name)):
        with pytest.raises(LpError) as caught:
            load_policy(source)
        assert len(str(caught.value)) < 500
    policy = tmp_path / "p.yaml"
    if name.isprintable():
        policy.write_text(f"extends: {name}\n")
        with pytest.raises(LpError, match=r"p\.yaml:1: extends\[0\]"):
            load_policy(policy)
        with pytest.raises(ConfigError):
            load_config({}, Path(name))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("version: '1'\n", 'version is a number. Expected 1, without quotes. Got "1"'),
        ("rules:\n- match: {name: !x}\n  fwd: {}\n", 'Try quotes round a glob: name: "!x"'),
        (
            "rules:\n- match:\n    name: !x\n  fwd: {}\n",
            "p.yaml:3: !x is read as a tag, which names a type. Try quotes",
        ),
        ("rules:\n- match: {name: ?x}\n  fwd: {}\n", 'Try quotes round a glob: name: "?x"'),
        ("rules:\n- match: {name: [qk]_proj}\n  fwd: {}\n", 'Try quotes round a glob: name: "[qk]_proj"'),
        ("rules:\n- match:\n    name: [qk]_proj\n  fwd: {}\n", 'Try quotes round a glob: name: "[qk]_proj"'),
        ("rules:\n- match: {name: *.mlp}\n  fwd: {}\n", 'Try quotes round a glob: name: "*.mlp"'),
        ("rules:\n- match: {name: \u201c*.mlp\u201d}\n  fwd: {}\n", "curly quotes"),
        ("rules:\n- fwd:\n\u00a0\u00a0\u00a0\u00a0x: e4m3\n", "no-break space"),
        ("rules:\n- \u00a0fwd: {}\n", "no-break space"),
        ("rules:\n\t- fwd: {}\n", "Try spaces"),
    ],
)
def test_a_mistake_says_what_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text(text)
    with pytest.raises(LpError) as caught:
        load_policy("p.yaml")
    assert sentence in str(caught.value)


def test_a_date_is_text_and_nothing_extended_is_nothing(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("source: 2020-01-01\nextends: []\n")
    assert load_policy(path).source == "2020-01-01"


def test_anchors_have_a_place_at_the_top(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        "x-eight: &eight {format: e4m3, scale: {granularity: row}}\nrules:\n- fwd: {x: *eight, w: *eight}\n"
    )
    (rule,) = load_policy(path).rules
    assert rule.fwd is not None
    assert rule.fwd.x == rule.fwd.w
    path.write_text("eight: &eight e4m3\nrules:\n- fwd: {x: *eight}\n")
    with pytest.raises(LpError, match=r'"eight" is not a key here.*x-eight, which is not read and may hold anchors'):
        load_policy(path)
