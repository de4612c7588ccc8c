"""Policy files: every error sentence with its line, extends and schedule, the shipped files, the schema."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lpcompile.errors import LpError, NotSupported, ParseError, PolicyError
from lpcompile.policy.file import load_policy, policy_schema, shipped_policies
from lpcompile.policy.resolve import Policy
from lpcompile.policy.rules import Site
from runtime.numerics.block_formats import BLOCK_FORMATS
from runtime.numerics.formats import FORMATS

SITES = [
    Site("stem", "conv2d", 0, 3, 64, 27),
    Site("mlp", "linear", 1, 3, 256, 64),
    Site("head", "linear", 2, 3, 10, 64),
    Site("attn", "matmul", None, 3, None, None),
]
ALL_FORMATS = ", ".join(FORMATS)
NAMES = ", ".join((*FORMATS, *BLOCK_FORMATS))
SHIPPED = "a path, or one of `lpcompile policy list`"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str, name: str = "policy.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def fwd(table: str) -> str:
    return f"rules:\n  - match: {{op: linear}}\n    fwd: {table}\n"


# Error sentences: text of the file, kind, what `str(error)` is

UNKNOWN_FORMAT = (
    f'"e4m4" is not a number format. Did you mean "e4m3"? Known: {NAMES}. '
    "Expected a name of the table, `1-E-M[:bias=B,top=T,subnormals=yes|no]`, `intB` or `uintB`. "
    "Try 1-4-4, which is a sign, 4 bits of exponent and 4 of mantissa."
)
WRONG_VALUES = [
    (
        "update:\n  rounding: stochastik\n",
        '2: update.rounding: "stochastik" is not a rounding. Did you mean "stochastic"? '
        "Known: nearest_even, nearest_away, toward_zero, stochastic.",
    ),
    (
        fwd("{x: {format: e4m3, quantizer: {kind: pact}}}"),
        "3: rules[0].fwd.x: a quantizer learns the scale of integers. Expected an integer format without a zero point. "
        "Try int4, uint4, int8, uint8, int4:range=full.",
    ),
    ("rules:\n  - fwd: {x: bf16}\n  - fwd:\n      w: bf16\n      x: e4m4\n", f"5: rules[1].fwd.x: {UNKNOWN_FORMAT}"),
    ("rules:\n- fwd:\n    x:\n      format: e4m4\n", f"4: rules[0].fwd.x.format: {UNKNOWN_FORMAT}"),
    (fwd("{out: e4m4}"), f"3: rules[0].fwd.out: {UNKNOWN_FORMAT}"),
    (fwd("{accumulate: e4m4}"), f"3: rules[0].fwd.accumulate: {UNKNOWN_FORMAT}"),
    ("name: a\nwire:\n  block: 3\n  format: e4m4\n", f"4: wire.format: {UNKNOWN_FORMAT}"),
    (
        "rules:\n- fwd: {x: e4m4}\nwire: {format: e4m4}\n",  # of two faults the first in the file
        f"2: rules[0].fwd.x: {UNKNOWN_FORMAT}",
    ),
    (
        fwd("{x: 1-9-9}"),
        '3: rules[0].fwd.x: "1-9-9" is not a float format this version has. Did you mean "1-8-9"? It is the nearest. '
        "Expected 2 to 8 exponent bits and 0 to 23 mantissa bits, those of fp32, which carries every value. "
        "Got 9 and 9.",
    ),
    (
        fwd("{x: {format: e4m3, rounding: stochastc}}"),
        '3: rules[0].fwd.x.rounding: "stochastc" is not a rounding. Did you mean "stochastic"? '
        "Known: nearest_even, nearest_away, toward_zero, stochastic.",
    ),
    (
        fwd("{x: {format: e4m3, scale: {rule: amx}}}"),
        '3: rules[0].fwd.x.scale.rule: "amx" is not a scale rule. Did you mean "amax"? Known: amax, pow2, sawb, '
        "delayed.",
    ),
    (
        fwd("{x: {format: e4m3, scale: {granularity: rows}}}"),
        '3: rules[0].fwd.x.scale.granularity: "rows" is not a scale granularity. Did you mean "row"? '
        "Known: tensor, row, column, channel, block.",
    ),
    *(
        (
            fwd(f"{{x: {{format: e4m3, scale: {{granularity: {word}}}}}}}"),
            f'3: rules[0].fwd.x.scale.granularity: "{word}" is not a scale granularity. '
            f'Expected one of tensor, row, column, channel, block. Got "{word}". Try {what}.',
        )
        for word, what in (
            (
                "vector",
                "row or column (one per token or feature), or block, block: [1, 16], for vectors of 16 along the sum",
            ),
            ("per-axis", "row, column, or of a weight channel (one per output channel or feature)"),
            ("sub_channel", "block, block: [1, 128], for groups of 128 along the sum"),
        )
    ),
    *(
        (
            fwd(f"{{x: {name}}}"),
            f'3: rules[0].fwd.x: "{name}" is not a number format. Did you mean {near}? Known: {NAMES}. '
            "Expected a name of the table, `1-E-M[:bias=B,top=T,subnormals=yes|no]`, `intB` or `uintB`."
            + (f" Try {parts}." if parts else ""),
        )
        for name, near, parts in (
            ("e5m3", '"e4m3" or "e5m2"', "1-5-3, which is a sign, 5 bits of exponent and 3 of mantissa"),
            ("float8_e5m3fn", '"e4m3" or "e5m2"', "1-5-3, which is a sign, 5 bits of exponent and 3 of mantissa"),
            ("e6m1", '"e5m2"', "1-6-1, which is a sign, 6 bits of exponent and 1 of mantissa"),
            ("e1m2", '"e2m1"', ""),
        )
    ),
    (
        fwd("{x: {format: e4m3, scale: {block: [1, 2]}}}"),
        '3: rules[0].fwd.x.scale.block: block is set and granularity is "tensor". Try granularity: block.',
    ),
    (
        fwd("{x: {format: e4m3, scale: {granularity: block, block: [1, 0]}}}"),
        "3: rules[0].fwd.x.scale.block[1]: not a value this key takes. Expected greater than 0. Got 0.",
    ),
    (
        fwd("{x: {format: e4m3, scale: row}}"),
        "3: rules[0].fwd.x.scale: not a mapping. Expected the keys granularity, rule, block, history, algorithm, "
        'margin, per_rank. Got "row".',
    ),
    (
        fwd("{x: int8, w: e4m3, accumulate: int32}"),
        "3: rules[0].fwd.accumulate: int32 sums need two integer operands. "
        "Got x: int8 and w: e4m3. Try accumulate: fp32.",
    ),
    (fwd("{x: e4m3, a: bf16}"), '3: rules[0].fwd.a: "a" and "x" name the same operand. Try one of them.'),
    (fwd("{x: {rounding: stochastic}}"), '3: rules[0].fwd.x: the key "format" is missing.'),
    (
        "rules:\n- match: {op: linear}\n",
        "2: rules[0]: the rule sets no role. Expected at least one of fwd, bwd, grad, or leave: true.",
    ),
    (
        "rules:\n- fwd: {}\n  match:\n    op: [linear, liner]\n",
        '4: rules[0].match.op: "liner" is not an op. Did you mean "linear"? Known: linear, conv1d, conv2d, conv3d, '
        "conv_transpose1d, conv_transpose2d, conv_transpose3d, matmul.",
    ),
    ("rules:\n- match: {op: []}\n  fwd: {}\n", "2: rules[0].match.op: not an op or a list of them. Got []."),
    (
        "rules:\n- match: {position: middle}\n  fwd: {}\n",
        '2: rules[0].match.position: "middle" is not a position. Known: first, last.',
    ),
    (
        "rules:\n- match: {shape: {m: 8}}\n  fwd: {}\n",
        '2: rules[0].match.shape.m: "m" is not a key here. m is not known when a model is compiled; n and k are.',
    ),
    (
        "rules:\n- match: {shape: {k: ~64}}\n  fwd: {}\n",
        '2: rules[0].match.shape.k: "~64" is not a bound. Expected a size such as 64 or a comparison such as >=64 '
        "(one of >= <= == != > < !% %).",
    ),
    ("rules: {fwd: {}}\n", "1: rules: not a value this key takes. Expected a list. Got {'fwd': {}}."),
    ("wire: {block: 3}\n", '1: wire: the key "format" is missing.'),
    (
        "wire:\n  format: e4m3\n  block: x\n",
        '3: wire.block: not a value this key takes. Expected a valid integer. Got "x".',
    ),
    (
        "wire: {format: e4m3, hierarchical: maybe}\n",
        '1: wire.hierarchical: "maybe" is not a value of hierarchical. Expected auto, true or false.',
    ),
    (
        "\n\nloss_scale: {kind: dynamc}\n",
        '3: loss_scale.kind: "dynamc" is not a loss scale. Did you mean "dynamic"? Known: none, static, dynamic.',
    ),
    (
        "loss_scale: {kind: dynamic, growth: 1}\n",
        "1: loss_scale.growth: not a value this key takes. Expected greater than 1. Got 1.",
    ),
    ("version: 2\n", "1: version: version 2 is not one this program reads. Expected 1."),
    ("name: 3\n", "1: name: not a value this key takes. Expected a valid string. Got 3."),
    (
        "schedule:\n  - from_step: 5\n",
        "1: schedule: no rules hold at step 0. Expected an entry with from_step: 0. Got from_step: 5.",
    ),
    (
        "schedule: [{from_step: 0}, {from_step: 3}, {from_step: 3}]\n",
        "1: schedule: two entries start at step 3. Expected one entry per step.",
    ),
    (
        "name: a\nextends:\n  - bf16\n  - hfp9\n",
        f'4: extends[1]: "hfp9" is neither a shipped policy nor a file. Did you mean "hfp8"? Known: {SHIPPED}.',
    ),
    (
        "schedule:\n- from_step: 0\n- {from_step: 9, policy: nowhere.yaml}\n",
        f'3: schedule[1].policy: "nowhere.yaml" is neither a shipped policy nor a file. Known: {SHIPPED}.',
    ),
]
WRONG_KEYS = [
    (
        "update: {weights: bf16}\n",
        '1: update.weights: "weights" is not a key here. Known: master, momentum, variance, rounding.',
    ),
    (
        "name: a\nrulez: []\n",
        '2: rulez: "rulez" is not a key here. Did you mean "rules"? Known: version, name, source, '
        "extends, rules, update, loss_scale, wire, schedule, evaluate, keep, elementwise, calibrate, kv_cache.",
    ),
    (
        "rules:\n- fwd:\n    x:\n      format: e4m3\n      roundin: stochastic\n",
        '5: rules[0].fwd.x.roundin: "roundin" is not a key here. Did you mean "rounding"? '
        "Known: format, rounding, scale, quantizer, transform.",
    ),
    (
        fwd("{dy: e5m2}"),
        '3: rules[0].fwd.dy: "dy" is not a key here. Known: accumulate, out, x, w, a, b.',
    ),
    (
        fwd("{x: {format: e4m3, transform: hadamard16}}"),
        "3: rules[0].fwd.x: a transform leaves a sum whose both operands have the same one. "
        "Got x: hadamard16 and w: none. Try one transform on both, or on none.",
    ),
    (
        fwd(
            "{x: {format: e4m3, transform: hadamard16}, "
            "w: {format: e4m3, transform: {kind: hadamard16, signs: random}}}"
        ),
        "3: rules[0].fwd.x: a transform leaves a sum whose both operands have the same one. "
        "Got x: hadamard16 and w: hadamard16[random]. Try one transform on both, or on none.",
    ),
    (
        fwd("{x: {format: e4m3, transform: hadamard12}}"),
        '3: rules[0].fwd.x.transform: "hadamard12" is not a transform. Did you mean "hadamard128"? '
        "Known: hadamard16, hadamard32, hadamard64, hadamard128.",
    ),
    (
        fwd('{x: {format: "nvfp4:scale=eden"}}'),
        "3: rules[0].fwd.x: nvfp4:scale=eden is unbiased over random rotations of 128 elements. Got no transform. "
        "Try hadamard128 with random signs.",
    ),
    (
        fwd("{x: {format: int4, quantizer: {kind: lsq}, transform: hadamard16}}"),
        "3: rules[0].fwd.x: a quantizer that learns sees the operand as it is. Got lsq and hadamard16. "
        "Try no transform.",
    ),
    (fwd("{x: e4m3, x: bf16}"), '3: rules[0].fwd: the key "x" stands here a second time; first on line 3.'),
    ("name: a\nsource: b\nname: c\n", '3: the key "name" stands here a second time; first on line 1.'),
    ("rules:\nname: a\n", '1: the key "rules" has no value. Try a value, or removing the key.'),
    ("name: a\non: 3\n", "2: a key is text. Got on. Try quotes round it."),
]
NOT_BUILT = [
    (
        fwd("{x: mxfp8, out: mxfp8}"),
        '3: rules[0].fwd.out: format "mxfp8" is a block format: it is for the operands of a GEMM and for quantize(). '
        f"Try one of {ALL_FORMATS}.",
    ),
    (
        fwd("{x: {format: int4, quantizer: {kind: dorefa}}}"),
        '3: rules[0].fwd.x.quantizer.kind: quantizer "dorefa" is planned and not in this version. '
        "Try one of pact, lsq, grad-scale.",
    ),
    *(
        (
            fwd(f"{{x: {{format: e4m3, scale: {{rule: {rule}}}}}}}"),
            f'3: rules[0].fwd.x.scale.rule: scale rule "{rule}" is planned and not in this version. '
            "Try one of amax, pow2, sawb, delayed.",
        )
        for rule in ("static", "mse", "learned")
    ),
    (
        "update: {master: int8}\n",
        "1: update.master: master int8 is no float format, and others hold no weights in this version. "
        "Try master: bf16, dlfloat16, e4m3 or fp32.",
    ),
    *(
        (
            f"name: a\n{key}: {{format: e4m3}}\n",
            f"2: {key}: {key} is not in this version. Try rules for GEMMs, loss_scale, wire and schedule.",
        )
        for key in ("elementwise", "calibrate", "kv_cache")
    ),
    (
        "wire: {format: e4m3, hierarchical: true}\n",
        "1: wire.hierarchical: hierarchical: true is not in this version. Try hierarchical: auto or false.",
    ),
    (
        "wire: {format: e4m3, error_feedback: true}\n",
        "1: wire.error_feedback: error_feedback: true is not in this version. Try error_feedback: false.",
    ),
]
NOT_YAML = [
    (
        "rules:\n- match: {name: *}\n  fwd: {}\n",
        "2: not YAML: while scanning an alias expected alphabetic or numeric character, but found '}'. "
        'Try quotes round a glob: name: "*".',
    ),
    ("rules: [\n", "2: not YAML: while parsing a flow node expected the node content, but found '<stream end>'."),
    ("- bf16\n", "1: not a policy. Expected a mapping of keys such as rules. Got a list."),
    ("hello\n", "1: not a policy. Expected a mapping of keys such as rules. Got a single value."),
    ("name: &a [*a]\n", "1: name[0]: an alias that contains itself."),
    (
        "name: a\nsource: !!python/object:os.system 3\n",
        "2: !!python/object:os.system is read as a tag, which names a type. Try the value without it.",
    ),
    ("name: a\n---\nname: b\n", "2: not YAML: expected a single document in the stream but found another document."),
]
CASES = [
    *((PolicyError, *case) for case in WRONG_VALUES + WRONG_KEYS),
    *((NotSupported, *case) for case in NOT_BUILT),
    *((ParseError, *case) for case in NOT_YAML),
]


@pytest.mark.parametrize(("kind", "text", "sentence"), CASES, ids=[case[2][:50] for case in CASES])
def test_an_error_is_a_sentence_with_its_line(folder: Path, kind: type[LpError], text: str, sentence: str) -> None:
    write(folder, text)
    with pytest.raises(LpError) as caught:
        load_policy("policy.yaml")
    assert str(caught.value) == f"policy.yaml:{sentence}"
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "policy.yaml: not a policy. Expected a mapping of keys such as rules. Got an empty file."),
        (b"name: \xff\n", "policy.yaml: not UTF-8 text. Got byte 0xff."),
    ],
)
def test_what_has_no_line_names_the_file(folder: Path, content: bytes, sentence: str) -> None:
    (folder / "policy.yaml").write_bytes(content)
    with pytest.raises(ParseError, match=f"^{re.escape(sentence)}$"):
        load_policy("policy.yaml")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("hfp9", f'"hfp9" is neither a shipped policy nor a file. Did you mean "hfp8"? Known: {SHIPPED}.'),
        (Path("hfp8"), f'"hfp8" is neither a shipped policy nor a file. Did you mean "hfp8"? Known: {SHIPPED}.'),
        (".", f'"." is a folder and not a policy file. Known: {SHIPPED}.'),
    ],
)
def test_a_missing_file_lists_the_shipped_names(folder: Path, source: str | Path, sentence: str) -> None:
    with pytest.raises(PolicyError) as caught:
        load_policy(source)
    assert str(caught.value) == sentence


# extends and schedule


def test_own_rules_come_before_inherited_ones_and_paths_are_relative_to_the_file(folder: Path) -> None:
    write(folder, "rules: [{fwd: {x: e3m2}}]\n", "base/deep.yaml")
    write(folder, "extends: deep.yaml\nrules: [{fwd: {x: e5m2}}]\n", "base/middle.yaml")
    write(folder, "extends: [base/middle.yaml, bf16]\nrules: [{fwd: {x: e4m3}}]\n")
    policy = load_policy("policy.yaml")
    assert [rule.fwd.x.format for rule in policy.rules if rule.fwd] == ["e4m3", "e5m2", "e3m2", "bf16"]
    assert policy.extends == ()
    assert policy.name == "policy"


def test_rules_say_the_file_they_come_from(folder: Path) -> None:
    write(folder, 'extends: bf16\nrules:\n  - match: {name: "*.lm_head"}\n    fwd: {x: e4m3}\n  - fwd: {x: e4m3}\n')
    resolved = load_policy("policy.yaml").resolve(SITES)
    assert [(use.label, use.condition) for use in resolved.rules if not use.sites] == [
        ("policy.yaml:3: rules[0]", "name *.lm_head")
    ]
    assert resolved.rule_of["mlp"] == {
        "fwd": "policy.yaml:5: rules[1]",
        "bwd": "bf16.yaml:9: rules[0]",
        "grad": "bf16.yaml:9: rules[0]",
    }


def test_own_values_come_over_inherited_ones_key_by_key(folder: Path) -> None:
    write(
        folder, "name: base\nsource: book\nwire: {format: e4m3, block: 64}\nloss_scale: {kind: static}\n", "base.yaml"
    )
    write(folder, "wire: {format: int8, block: 32, min_numel: 7}\nloss_scale: {kind: none, init: 4}\n", "second.yaml")
    write(folder, "extends: [base.yaml, second.yaml]\nwire: {format: e5m2}\n")
    policy = load_policy("policy.yaml")
    assert policy.wire is not None
    assert (policy.wire.format, policy.wire.block, policy.wire.min_numel) == ("e5m2", 64, 7)
    assert (policy.loss_scale.kind, policy.loss_scale.init) == ("static", 4)
    assert (policy.name, policy.source) == ("policy", "")


def test_a_rule_inherited_twice_is_kept_once(folder: Path) -> None:
    write(folder, "extends: bf16\n", "left.yaml")
    write(folder, "extends: bf16\n", "right.yaml")
    write(folder, "extends: [left.yaml, right.yaml]\n")
    assert load_policy("policy.yaml").rules == load_policy("bf16").rules


def test_a_cycle_is_printed(folder: Path) -> None:
    write(folder, "extends: b.yaml\n", "a.yaml")
    write(folder, "name: b\nextends: [c.yaml]\n", "b.yaml")
    write(folder, "extends: b.yaml\n", "c.yaml")
    with pytest.raises(PolicyError) as caught:
        load_policy("a.yaml")
    assert str(caught.value) == (
        "c.yaml:1: extends[0]: the policies name each other in a circle: b.yaml -> c.yaml -> b.yaml."
    )


def test_a_schedule_brings_in_the_rules_it_names(folder: Path) -> None:
    write(folder, "extends: hfp8\nschedule: [{from_step: 0, policy: bf16}, {from_step: 200}]\n")
    policy = load_policy("policy.yaml")
    (start, warm), (turn, main) = policy.phases
    assert (start, warm.name, warm.rules) == (0, "bf16", load_policy("bf16").rules)
    assert (turn, main.name, main.rules) == (200, "policy", load_policy("hfp8").rules)
    assert warm.wire == main.wire == load_policy("hfp8").wire


def test_a_schedule_is_inherited_as_a_whole(folder: Path) -> None:
    write(folder, "schedule: [{from_step: 0, policy: bf16}, {from_step: 9}]\n", "base.yaml")
    write(folder, "extends: base.yaml\nrules: [{fwd: {x: e4m3}}]\n")
    assert [step for step, _ in load_policy("policy.yaml").phases] == [0, 9]
    write(folder, "extends: base.yaml\nschedule: [{from_step: 0}]\n")
    assert [step for step, _ in load_policy("policy.yaml").phases] == [0]


def test_a_schedule_does_not_nest_and_does_not_name_itself(folder: Path) -> None:
    write(folder, "schedule: [{from_step: 0, policy: bf16}]\n", "inner.yaml")
    write(folder, "schedule:\n- {from_step: 0, policy: inner.yaml}\n")
    with pytest.raises(PolicyError) as caught:
        load_policy("policy.yaml")
    assert str(caught.value) == 'policy.yaml:2: schedule[0].policy: "inner" has a schedule of its own. Try one without.'
    write(folder, "schedule:\n- {from_step: 0, policy: policy.yaml}\n")
    with pytest.raises(PolicyError, match=r"^policy\.yaml:2: .* in a circle: policy\.yaml -> policy\.yaml\.$"):
        load_policy("policy.yaml")


def test_a_policy_made_in_python_is_completed_too() -> None:
    policy = Policy(extends=("bf16",), schedule=({"from_step": 0, "policy": "fp16"},))  # type: ignore[arg-type]
    loaded = load_policy(policy)
    assert loaded.rules == load_policy("bf16").rules
    assert loaded.phases[0][1].rules == load_policy("fp16").rules
    assert load_policy(loaded) == loaded


def test_a_merge_key_and_an_anchor_keep_their_lines(folder: Path) -> None:
    write(folder, "rules:\n- fwd: &t\n    x: e4m3\n    w: e4m3\n- fwd:\n    <<: *t\n    w: e4m4\n")
    with pytest.raises(PolicyError, match=r"^policy\.yaml:7: rules\[1\]\.fwd\.w: "):
        load_policy("policy.yaml")
    write(folder, "rules:\n- fwd: &t\n    x: e4m3\n    w: e4m3\n- fwd:\n    <<: *t\n    w: bf16\n")
    table = load_policy("policy.yaml").rules[1].fwd
    assert table is not None
    assert (table.x.format, table.w.format) == ("e4m3", "bf16")


# The shipped files


@pytest.mark.parametrize("name", shipped_policies())
def test_a_shipped_policy_round_trips_through_a_file(folder: Path, name: str) -> None:
    policy = load_policy(name)
    assert policy.name == name
    assert policy.source
    write(folder, policy.to_yaml(), "again.yaml")
    assert load_policy("again.yaml") == policy
    assert load_policy("again.yaml").hash == policy.hash


def fwd_bwd_grad(name: str) -> dict[str, str]:
    specs = load_policy(name).resolve(SITES).specs
    return {site: str(spec) if spec else "left alone" for site, spec in specs.items()}


def layer(fwd: str, bwd: str, grad: str, out: str = "fp32", sums: str = "fp32") -> str:
    return f"fwd: {fwd} -> {sums} -> {out}; bwd: {bwd} -> fp32 -> {out}; grad: {grad} -> fp32 -> {out}"


def alike(name: str, out: str) -> str:
    pair = f"{name} nearest_even * {name} nearest_even"
    return layer(pair, pair, pair, out)


EIGHT = layer(
    "hfp8-143 nearest_even * hfp8-143 nearest_even",
    "e5m2 nearest_even * hfp8-143 nearest_even",
    "e5m2 nearest_even * hfp8-143 nearest_even",
)
ROWS = layer(
    "e4m3 nearest_even row/amax * e4m3 nearest_even row/amax",
    "e5m2 nearest_even row/amax * e4m3 nearest_even column/amax",
    "e5m2 nearest_even column/amax * e4m3 nearest_even column/amax",
)
INT_LINEAR = layer(
    "int8 nearest_even row/amax * int8 nearest_even row/amax",
    "fp32 nearest_even * int8 nearest_even column/amax",
    "fp32 nearest_even * int8 nearest_even column/amax",
    sums="int32",
)
INT_CONV = layer(
    "int8 nearest_even tensor/amax * int8 nearest_even channel/amax",
    "fp32 nearest_even * int8 nearest_even channel/amax",
    "fp32 nearest_even * int8 nearest_even tensor/amax",
)
ALONE = "left alone"


@pytest.mark.parametrize(
    ("name", "stem", "mlp", "head", "attn"),
    [
        ("fp32", ALONE, ALONE, ALONE, ALONE),
        ("fp32-emulated", *[alike("fp32", "fp32")] * 4),
        ("bf16", *[alike("bf16", "bf16")] * 4),
        ("fp16", *[alike("fp16", "fp16")] * 3, ALONE),
        ("hfp8", alike("bf16", "fp32"), EIGHT, alike("bf16", "fp32"), ALONE),
        ("fp8-rowwise", ALONE, ROWS, ROWS, ALONE),
        ("int8", INT_CONV, INT_LINEAR, INT_LINEAR, ALONE),
    ],
)
def test_what_a_shipped_policy_computes_in(name: str, stem: str, mlp: str, head: str, attn: str) -> None:
    assert fwd_bwd_grad(name) == {"stem": stem, "mlp": mlp, "head": head, "attn": attn}


def test_which_shipped_policies_scale_the_loss_and_compress_the_wire() -> None:
    policies = {name: load_policy(name) for name in shipped_policies()}
    assert {name for name, policy in policies.items() if policy.loss_scale.kind == "dynamic"} == {
        "fp16",
        "hfp8",
        "hfp8-2019",
    }
    assert {name for name, policy in policies.items() if policy.loss_scale.kind == "static"} == {"fp8-2018"}
    assert {policies[name].loss_scale.init for name in ("fp16", "hfp8")} == {65536}
    wires = {name: (policy.wire.format, policy.wire.block) for name, policy in policies.items() if policy.wire}
    compressed = ("hfp8", "hfp8-2019", "fp8-rowwise", "te-current", "te-delayed", "deepseek-v3", "mxfp8")
    assert wires == dict.fromkeys(compressed, ("e4m3", 256))


@pytest.mark.parametrize("name", shipped_policies())
def test_no_shipped_rule_is_unmatched_in_a_model_without_convolutions(name: str) -> None:
    sites = [Site("mlp", "linear", 0, 2, 256, 64), Site("head", "linear", 1, 2, 10, 64)]
    assert not any(use.is_idle for use in load_policy(name).resolve(sites).rules)


# The schema


def is_valid(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """The part of JSON Schema that the policy schema uses."""
    if "$ref" in schema:
        return is_valid(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    if "anyOf" in schema and not any(is_valid(value, option, root) for option in schema["anyOf"]):
        return False
    types = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}
    if "type" in schema and schema["type"] != "boolean" and not isinstance(value, types[schema["type"]]):
        return False
    if ("enum" in schema and value not in schema["enum"]) or ("const" in schema and value != schema["const"]):
        return False
    if isinstance(value, dict) and "properties" in schema:
        properties = schema["properties"]
        named = {key: item for key, item in value.items() if not key.startswith("x-")}
        return all(key in properties and is_valid(item, properties[key], root) for key, item in named.items()) and all(
            key in value for key in schema.get("required", ())
        )
    if isinstance(value, list) and "items" in schema:
        return all(is_valid(item, schema["items"], root) for item in value)
    return True


@pytest.mark.parametrize("name", shipped_policies())
def test_the_schema_accepts_the_shipped_files_as_written_and_as_printed(name: str) -> None:
    schema = policy_schema()
    for text in (shipped_policies()[name].read_text(), load_policy(name).to_yaml()):
        raw = yaml.safe_load(text)
        assert is_valid(raw, schema, schema)
        if importlib.util.find_spec("jsonschema"):
            importlib.import_module("jsonschema").validate(raw, schema)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("rules: [{match: {op: linear}, fwd: {x: e4m3, accumulate: fp32}}]", True),
        ("rules: [{match: {op: [linear, matmul], position: first}, fwd: {a: {format: e4m3}, b: e5m2}}]", True),
        ("rules: [{match: {shape: {k: 64, n: '>=8'}}, grad: {dy: e4m3, a: e4m3}}]", True),
        ("extends: bf16\nschedule: [{from_step: 0, policy: bf16}, {from_step: 2}]", True),
        ("wire: {format: e4m3, hierarchical: false}", True),
        ("rules: [{fwd: {x: {formt: e4m3}}}]", False),
        ("rules: [{fwd: {dy: e4m3}}]", False),
        ("rules: [{match: {op: liner}, fwd: {}}]", False),
        ("rules: {fwd: {}}", False),
        ("wire: {block: 3}", False),
        ("version: 2", False),
    ],
)
def test_the_schema_knows_the_shorthands_and_the_keys(text: str, valid: bool) -> None:
    schema = policy_schema()
    assert is_valid(yaml.safe_load(text), schema, schema) is valid


def test_every_key_of_the_schema_says_what_it_means() -> None:
    definitions = policy_schema()["$defs"]
    sections = [policy_schema(), *definitions.values()]
    sections += [option for section in sections for option in section.get("anyOf", ())]
    for section in sections:
        for key, value in section.get("properties", {}).items():
            target = definitions.get(value.get("$ref", "").removeprefix("#/$defs/"), {})
            assert value.get("description", target.get("description")), key
