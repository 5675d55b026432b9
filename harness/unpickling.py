"""A pickle module for torch.load that runs no code of a file: what a file calls for is put in by name only.

A pickle names classes and functions, and says with what to call them. Here the few that tensors need are
known; every other name becomes an Inert, which keeps what it is given and does nothing. So a file of weights
can be read in which other things lie too: a Namespace of options, a number of numpy's, a whole pickled
network.
"""
import collections
import functools
import pickle

import torch


class Inert(dict):
    """What stands in for an object of a class that is not known here. Its content are its items.

    name    of the class or function, as the file has it
    """
    name = ""
    dump_patches = False  # torch.load asks a pickled network's class for it

    def __init__(self, *given):
        """What a constructor is called with: of a Counter, for one, a dict of all that is in it."""
        super().__init__()
        self.__setstate__(given)

    def __setstate__(self, state):
        """The object's attributes, in the ways in which pickles have them."""
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.update(part)

    def append(self, value):
        """A list of an unknown class has no names, and is none of a network's."""

    def extend(self, values):
        """The same."""

    def __hash__(self):
        return id(self)


@functools.cache  # a file can name one a million times
def inert(name):
    """The stand-in for a class or a function of this name."""
    return type("Inert", (Inert,), {"name": name})


def rebuilt(storage, offset, size, stride, *others):
    """A tensor. The others are for gradients.

    Raises ValueError where it is larger than its storage, which torch would enlarge for it.
    """
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if offset < 0 or 0 not in size and not 0 <= last < storage.size():
        raise ValueError("a tensor larger than its storage")
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def parameter(t, *others):
    """A parameter is its tensor here."""
    return t


def with_attributes(function, kind, args, attributes):
    """A tensor that somebody has given attributes: without them."""
    return function(*args)


def no_default(*given):
    """A defaultdict is a dict here."""
    return {}


KNOWN = {
    "collections.OrderedDict": collections.OrderedDict,
    "collections.defaultdict": no_default,
    "torch._utils._rebuild_tensor_v2": rebuilt,
    "torch._utils._rebuild_parameter": parameter,
    "torch._utils._rebuild_parameter_with_state": parameter,
    "torch._tensor._rebuild_from_type_v2": with_attributes,
    "torch.Size": tuple,
}


class Unpickler(pickle._Unpickler):
    """An unpickler that knows KNOWN. It is pickle's own in Python, not the faster one in C: that one would
    let a file set attributes of the functions in KNOWN."""
    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module, name):
        full = f"{module}.{name}"
        return KNOWN[full] if full in KNOWN else inert(full)

    def load_build(self):
        """Give an object its attributes: none but an Inert takes any."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].__setstate__(state)

    dispatch[pickle.BUILD[0]] = load_build
    # torch.save writes neither: the one asks for any amount of memory, the other calls an object's `add`.
    del dispatch[pickle.BYTEARRAY8[0]], dispatch[pickle.ADDITEMS[0]]


def load(file, **options):
    """As pickle.load: torch asks for it, for what stands before the tensors in files of old."""
    return Unpickler(file, **options).load()
