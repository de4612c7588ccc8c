"""Golden texts: FileCheck lines against the text of a program, in this process.

    check(program, '''
    // CHECK: [[Q:%[a-z0-9_]+]] = "lp.quantize"(%x)
    // CHECK-NOT: lp.quantize
    // CHECK: "lp.gemm"({{.*}}[[Q]]
    ''')

LLVM's FileCheck: CHECK, CHECK-NEXT, CHECK-SAME, CHECK-NOT, CHECK-DAG, CHECK-LABEL, CHECK-COUNT-n; {{regex}};
[[NAME:regex]] then [[NAME]]. Runs of blanks count as one.
"""

import io

from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import Options
from filecheck.parser import Parser, pattern_for_opts

from passes.ir.parser import parse_program
from passes.ir.printer import print_program
from passes.ir.program import Program
from passes.manager import parse_passes, run_passes
from passes.pipelines import PASSES


def check(text: str | Program, checks: str) -> None:
    """AssertionError, with what was looked for and where, if the text does not hold what the lines of `checks` say."""
    text = text if isinstance(text, str) else print_program(text)
    options = Options(match_filename="golden")
    matcher = Matcher(options, FInput("text", text), Parser(options, io.StringIO(checks), *pattern_for_opts(options)))
    matcher.stderr = said = io.StringIO()
    if matcher.run() != 0:
        raise AssertionError(f"{said.getvalue()}\nin the text\n{text}")


def run(text: str, passes: str) -> str:
    """The text after `passes`, as `share-casts,select-kernels`, ran on the program of `text`."""
    program = parse_program(text)
    run_passes(program, parse_passes(passes, PASSES))
    return print_program(program)
