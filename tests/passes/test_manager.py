"""The pass manager: passes print and parse, are verified between, and keep their records."""

import pytest

from passes.ir.program import Program
from passes.manager import parse_passes, run_passes
from passes.pipelines import PASSES, PIPELINES
from runtime.errors import PassError


@pytest.mark.parametrize("text", [*PIPELINES.values(), "share-casts{across=graph}", "annotate, select-kernels"])
def test_passes_print_and_parse(text: str) -> None:
    passes = parse_passes(text, PASSES)
    printed = ",".join(str(each) for each in passes)
    assert parse_passes(printed, PASSES) == passes


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("anotate", r'"anotate" is not a pass. Try "annotate"'),
        ("share-casts{acros=graph}", r'share-casts has no option "acros". Try "across"'),
    ],
)
def test_unknown_names_get_the_nearest_one(text: str, sentence: str) -> None:
    with pytest.raises(PassError, match=sentence):
        parse_passes(text, PASSES)


@pytest.mark.parametrize("mode", PIPELINES)
def test_records_name_every_pass(mode: str) -> None:
    seen: list[str] = []
    passes = parse_passes(PIPELINES[mode], PASSES)
    records = run_passes(Program({}, {}), passes, lambda each, _: seen.append(each.name))
    assert seen == [record.name.partition("{")[0] for record in records] == [each.name for each in passes]
    assert not any(record.changed for record in records)


def test_every_pass_is_in_a_pipeline() -> None:
    assert {each.name for text in PIPELINES.values() for each in parse_passes(text, PASSES)} == {*PASSES}
