"""Shape comments are executed: in `name = ...  # (N, d)`, the comment becomes a check of the shape of `name`.

Within one call of a function a letter keeps its meaning, and a letter that is a local variable has its value:

    x = torch.cat([a, b])            # (2, N)
    p, z = model(x1, x2)             # p, z, (N, d) each

resnet.py is not among the modules. Its comments hold for ResNet-50 at 224 pixels, and tests/test_resnet.py
compares them with that network.
"""
import ast
import contextlib
import functools
import importlib
import importlib.util
import re
import sys

import numpy as np

from tests.helpers import ROOT

DIM = r"\w+(?: [+] \w+)?"
SHAPE = re.compile(rf"# (?:.*(?:,|->) )?\(({DIM}(?:, *{DIM})*),?\)(?: each)?(?:: .*)?$")
SCRIPTS = ["augment", "simsiam", "lineval", "related"]
FOLDERS = ["harness.common", "harness.data", "harness.training", "harness.evaluation"]
ROOMS = [f"{folder}.{path.stem}" for folder in FOLDERS
         for path in sorted((ROOT / folder.replace(".", "/")).glob("[a-z]*.py"))]


def file_of(module):
    """harness.common.draws -> harness/common/draws.py"""
    return module.replace(".", "/") + ".py"


def is_shape(comment):
    """Whether a comment is only a shape."""
    return SHAPE.fullmatch(comment) is not None


def arrays_in(value):
    """The arrays in nested tuples, in order."""
    if not isinstance(value, (tuple, list)):
        return [value]
    return [array for part in value for array in arrays_in(part)]


def check_shape(seen, place, value, letters, scope):
    """Compare a value's shapes with the comment. A letter without a meaning gets one, in `letters`."""
    dims = [dim.strip() for dim in SHAPE.search(place[2])[1].split(",")]
    known = {name: v for name, v in scope.items() if isinstance(v, (int, np.integer))}
    for array in arrays_in(value):
        for dim, size in zip(dims, array.shape):
            letter, _, more = dim.partition(" + ")
            if not letter.isdigit() and letter not in known:
                letters.setdefault(letter, size - int(more or 0))
        expected = tuple(eval(dim, {}, known | letters) for dim in dims)
        assert tuple(array.shape) == expected, place
    seen.add(place)


class ShapeChecks(ast.NodeTransformer):
    """After each assignment with a shape comment, a call of check_shape; in each function, `_letters`."""

    def __init__(self, file):
        self.file = file
        self.text = (ROOT / file).read_text()
        self.lines = self.text.splitlines()
        self.places = set()
        self.tree = ast.fix_missing_locations(self.visit(ast.parse(self.text)))

    def visit_Assign(self, node):
        line = self.lines[node.end_lineno - 1]
        if not SHAPE.search(line):
            return node
        place = self.file, node.end_lineno, line
        self.places.add(place)
        check = f"_check_shape({place!r}, ({ast.unparse(node.targets[0])}), _letters, locals())"
        return [node, *ast.parse(check).body]

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        node.body[:0] = ast.parse("_letters = {}").body
        return node


class ShapeCheckingImport:
    """For sys.meta_path: it imports our modules with shape comments turned into checks.

    places: where the comments are. seen: those whose check has run
    """

    def __init__(self):
        self.places = set()
        self.seen = set()

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in SCRIPTS + ROOMS else None

    def create_module(self, spec):
        return None  # the usual one

    def exec_module(self, module):
        file = file_of(module.__name__)
        checks = ShapeChecks(file)
        self.places |= checks.places
        module.__file__ = str(ROOT / file)
        module._check_shape = functools.partial(check_shape, self.seen)
        exec(compile(checks.tree, file, "exec"), module.__dict__)


@contextlib.contextmanager
def checking_shapes():
    """Within the block, our modules are versions that check their shape comments -> the importer"""
    importer = ShapeCheckingImport()
    names = ["harness", *FOLDERS, *ROOMS, *SCRIPTS]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.meta_path.insert(0, importer)
    try:
        for name in names:
            importlib.import_module(name)
        yield importer
    finally:
        sys.meta_path.remove(importer)
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
