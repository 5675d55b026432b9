"""Claims: a tag that trails a line of code, `# Eq. (4): ...`, says that this line is the equation.

    found = claims(SOURCES, TAG, MAP, globals())        all claims of these files, in the order of MAP
    equation_table(found, MAP)                          their table, in Markdown
    mutant_of(claim, MAP)                               the module with the claimed line made wrong

MAP is {tag: (the equation, part of the claimed line, what a mutant has instead, or None)}. That of SimSiam's
paper is in test_simsiam.py, that of its neighbours in tests/test_related.py.
"""
import collections
import functools
import inspect
import re
import tokenize
import types

import pytest

from tests.helpers import ROOT

Claim = collections.namedtuple("Claim", "tag words file line test")


@functools.cache
def trailing_comments(file):
    """[(line number, comment)] of all comments in a file that trail code."""
    with open(ROOT / file, "rb") as f:
        tokens = list(tokenize.tokenize(f.readline))
    found = []
    for token in tokens:
        if token.type == tokenize.COMMENT and not token.line.lstrip().startswith("#"):
            found.append((token.start[0], token.string))
    return found


def test_of(tag, names):
    """The one of these names that belongs to a tag.

    For Eq. (4) test_eq04_..., for Sec. 4.1 (std) test_sec41_std_..., for MoCo v2 Eq. (1) test_moco_v2_eq1_...
    """
    words = re.sub(r"[^a-z0-9 ]", "", tag.lower())
    stem = re.sub(r"(eq|alg|sec|fig) ", r"\1", words).replace(" ", "_")
    stem = re.sub(r"^eq(\d)$", r"eq0\1", stem)
    fitting = [name for name in names if name.startswith(f"test_{stem}_")]
    assert len(fitting) == 1, f"{len(fitting)} tests called test_{stem}_..."
    return fitting[0]


def claims(sources, pattern, equations, names):
    """All claims of some files, in the order of MAP.

    pattern     matches a claim's comment; its groups are the tag and the words
    names       of all tests
    """
    found = []
    for file in sources:
        for line, comment in trailing_comments(file):
            if match := pattern.match(comment):
                tag, words = match.groups()
                found.append(Claim(tag, words, file, line, test_of(tag, names)))
    order = list(equations)
    return sorted(found, key=lambda claim: order.index(claim.tag) if claim.tag in order else -1)


def claimed_line(claim):
    """A claim's line, without its comment."""
    line = (ROOT / claim.file).read_text().splitlines()[claim.line - 1]
    return line[:line.index("# " + claim.tag)]


def check_claims(found, equations):
    """Each tag is claimed by one line, the right one, in a few words without a formula.

    The equation survives in a Markdown table: braces match, and Markdown's own characters don't occur. It has
    a mutant, unless a test claims it.
    """
    assert [claim.tag for claim in found] == list(equations)
    for claim in found:
        equation, right, wrong = equations[claim.tag]
        assert len(claim.words.split()) <= 10, claim
        assert not re.search(r"[=|<>^]", claim.words), claim
        assert claimed_line(claim).count(right) == 1, claim
        assert equation.count("{") == equation.count("}"), claim
        assert equation.count("(") == equation.count(")"), claim
        assert not re.search(r"[|$*]|\\[^a-zA-Z]", equation), claim
        assert (wrong is None) == ("test" in claim.file), claim


def check_departures(file, expected, page, heading):
    """Compare the marks of departures in a file with the table under this heading of a page.

    expected: [(words in the line with the mark, first cell of its row)], in the file's order
    -> the first cells of all rows
    """
    marks = [line for line in (ROOT / file).read_text().splitlines() if "DEPARTURE" in line]
    _, after = (ROOT / page).read_text().split(heading)
    table, *_ = after.split("\n\n")
    rows = re.findall(r"^\| ([^|]+) \|", table, re.M)
    for mark, (words, row) in zip(marks, expected, strict=True):
        assert words in mark
        assert row in rows
    return set(rows)


def equation_table(found, equations, back=""):
    """Claims as a table. back: from the folder of the page to the root."""
    rows = ["| in the paper | equation | line | test |", "|---|---|---|---|"]
    for claim in found:
        place = f"[{claim.file}:{claim.line}]({back}{claim.file}#L{claim.line})"
        rows.append(f"| {claim.tag} | ${equations[claim.tag][0]}$ | {place} | `{claim.test}` |")
    return "\n".join(rows) + "\n"


def mutant(file, right, wrong, line=None):
    """The module in a file, with `wrong` instead of `right`: in this line, or where it occurs once."""
    lines = (ROOT / file).read_text().splitlines(keepends=True)
    if line is None:
        line, = (number for number, text in enumerate(lines, 1) if right in text)
    assert right in lines[line - 1], (file, line, right)
    lines[line - 1] = lines[line - 1].replace(right, wrong, 1)
    module = types.ModuleType(file.removesuffix(".py"))
    module.__file__ = str(ROOT / file)
    code = compile("".join(lines), f"a mutant of {file}", "exec")
    exec(code, module.__dict__)
    return module


def mutant_of(claim, equations):
    """The module that makes this claim, with its line made wrong."""
    _, right, wrong = equations[claim.tag]
    return mutant(claim.file, right, wrong, claim.line)


def check_it_dies(mutant, rooms, test, request):
    """A test fails with a mutant instead of the module, in all rooms (dictionaries of names)."""
    arguments = arguments_for(test, request)
    with pytest.MonkeyPatch.context() as patch:
        for room in rooms:
            patch.setitem(room, mutant.__name__, mutant)
        with pytest.raises(AssertionError):
            test(**arguments)


def arguments_for(test, request):
    """The arguments with which pytest would call a test: its fixtures, and the first of its parameters."""
    arguments = {}
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names, (first, *_) = mark.args
            several = names.split(", ")
            arguments |= zip(several, first if len(several) > 1 else [first])
    for name in inspect.signature(test).parameters.keys() - arguments.keys():
        arguments[name] = request.getfixturevalue(name)
    return arguments
