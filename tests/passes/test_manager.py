"""The pass manager: passes print and parse, are verified between, and keep their records."""

import pytest

from passes.ir.program import Program
from passes.manager import parse_passes, run_passes
from passes.pipelines import PASSES, PIPELINES
from runtime.errors import PassError


@pytest.mark.parametrize("text", [*PIPELINES.values(), "fold-constants{lifetime=forever}", "annotate, select-kernels"])
def test_passes_print_and_parse(text: str) -> None:
    passes = parse_passes(text, PASSES)
    printed = ",".join(str(each) for each in passes)
    assert parse_passes(printed, PASSES) == passes


WRONG: dict[str, tuple[str, str]] = {
    # text: what the error says before its hint, and the hint
    "anotate": (
        'passes, item 1: "anotate" is not a pass. Expected the name of a pass. Got "anotate"',
        '"annotate"? Known: ',
    ),
    "annotate,x": (
        'passes, item 2: "x" is not a pass. Expected the name of a pass. Got "x"',
        "Known: choose-accumulator",
    ),
    "fold-constants{lifetim=forever}": (
        'fold-constants: it has no option "lifetim". Expected lifetime. Got "lifetim=forever"',
        '"lifetime"? Known: lifetime',
    ),
    "annotate{x=1}": ('annotate: it has no option "x". Expected no options. Got "x=1"', "annotate"),
    "fold-constants{lifetime}": (
        'fold-constants: an option without value. Expected option=value. Got "lifetime"',
        "lifetime=step",
    ),
    "fold-constants{lifetime=here}": (
        "fold-constants{lifetime}: no such lifetime. Expected step or forever. Got here",
        "fold-constants{lifetime=step}",
    ),
    "fold-constants{lifetime=step,lifetime=forever}": (
        'fold-constants: the option "lifetime" is there twice. Expected each option once. Got "lifetime=forever"',
        "one of the two",
    ),
    "fold-constants{lifetime=step,}": (
        'fold-constants: an option without value. Expected option=value. Got ""',
        "lifetime=st",
    ),
    "place-regions{finite=yes}": (
        "place-regions{finite}: not a truth value. Expected true or false. Got yes",
        "finite=false",
    ),
    "choose-accumulator{exponent=x}": (
        "choose-accumulator{exponent}: not a number of this kind. Expected a whole number. Got x",
        "exponent=8",
    ),
    "choose-accumulator{nonzero=2}": (
        "choose-accumulator{nonzero}: no share of the products. Expected 0 < nonzero <= 1. Got 2.0",
        "choose-accumulator{exponent=8,nonzero=1.0}",
    ),
    "fold-constants{lifetime=step": (
        "passes, item 1: a brace is not closed. Expected NAME or NAME{option=value,...}. Got fold-constants{lifetime",
        "fold-constants{lifetime=step}",
    ),
    "annotate,fold-constants{lifetime=step}}": (
        "passes, item 2: a brace too much. Expected NAME or NAME{option=value,...}. Got fold-constants{lifetime=step}}",
        "fold-constants{lifetime=step}",
    ),
    "fold-constants{lifetime={step}}": ("passes, item 1: a brace too much", "fold-constants"),
    "fold-constants{lifetime=step}x": (
        "passes, item 1: there is more after the brace. Expected NAME or NAME{option=value,...}. Got fold-constants{",
        "fold-constants{lifetime=step},x",
    ),
    "annotate,,select-kernels": (
        "passes, item 2: no pass between two commas. Expected NAME or NAME{option=value,...}. Got annotate,,select",
        "annotate,select-kernels",
    ),
    "annotate,": ("passes, item 2: no pass between two commas", "annotate"),
    ",": ("passes, item 1: no pass between two commas", '""'),
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_list_of_passes_is_said_in_four_parts(text: str) -> None:
    sentence, hint = WRONG[text]
    with pytest.raises(PassError) as caught:
        parse_passes(text, PASSES)
    error = caught.value
    assert str(error).startswith(sentence)
    assert error.hint.startswith(hint)
    assert error.where
    assert error.expected
    assert error.got


@pytest.mark.parametrize("text", ["", "  ", "annotate{}", " annotate , fold-constants{ lifetime = forever } "])
def test_spaces_and_nothing_are_fine(text: str) -> None:
    assert len(parse_passes(text, PASSES)) == (0 if not text.strip() else text.count(",") + 1)


@pytest.mark.parametrize("mode", PIPELINES)
def test_records_name_every_pass(mode: str) -> None:
    seen: list[str] = []
    passes = parse_passes(PIPELINES[mode], PASSES)
    records = run_passes(Program({}, {}), passes, lambda each, _: seen.append(each.name))
    assert seen == [record.name.partition("{")[0] for record in records] == [each.name for each in passes]
    assert not any(record.changed for record in records)


def test_every_pass_is_in_a_pipeline() -> None:
    assert {each.name for text in PIPELINES.values() for each in parse_passes(text, PASSES)} == {*PASSES}
