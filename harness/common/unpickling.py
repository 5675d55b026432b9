"""A pickle module for torch.load that runs no code of a file: what a file calls for is put in by name only.

A pickle names classes and functions, and says with what to call them. Here the few that tensors need are
known; every other name becomes an Inert, which keeps what it is given and does nothing. So a file of weights
can be read in which other things lie too: a Namespace of options, a number of numpy's, a whole pickled
network.

The form of before torch 1.6 is a chain of pickles, with the values of all tensors behind it. Nothing in it
makes sure that there are as many as the pickles say, so Pickles counts them.
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


class UntypedStorage(Inert):
    """What stands in for the class of a storage of bytes. torch.load asks it for their type."""
    name = "torch.storage.UntypedStorage"
    dtype = torch.uint8


def rebuilt(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    """A tensor; what is said of gradients plays no part.

    Raises ValueError where it is larger than its storage, which torch would enlarge for it.
    """
    if metadata:  # its values are not those of the storage
        return inert("tensor with a negative or conjugate bit")()
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
    "torch._utils._rebuild_tensor": rebuilt,
    "torch._utils._rebuild_tensor_v2": rebuilt,
    "torch._utils._rebuild_parameter": parameter,
    "torch._utils._rebuild_parameter_with_state": parameter,
    "torch._tensor._rebuild_from_type_v2": with_attributes,
    "torch.nn.parameter.Parameter": parameter,
    "torch.Size": tuple,
    "torch.UntypedStorage": UntypedStorage,
    "torch.storage.UntypedStorage": UntypedStorage,
}
PLAIN = (str, int, float, bool, type(None), bytes)


def is_key(value):
    """Whether a key of a dict can be part of a name: a word, a number, a class.

    Other keys are left out. To hash a tuple in a tuple, a million times over, would end the process.
    """
    return isinstance(value, (*PLAIN, Inert)) or isinstance(value, type) and issubclass(value, Inert)


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

    def put(self, items):
        """Put keys and values, in turn, into the dict on the stack."""
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update((key, value) for key, value in zip(items[::2], items[1::2]) if is_key(key))

    def load_setitem(self):
        """A key and a value."""
        value = self.stack.pop()
        key = self.stack.pop()
        self.put([key, value])

    def load_setitems(self):
        """Many of them."""
        self.put(self.pop_mark())

    def load_dict(self):
        """A new dict of many of them."""
        items = self.pop_mark()
        self.stack.append({})
        self.put(items)

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    # torch.save writes none of these. They ask for any amount of memory, call an object's `add`, or hash
    # whatever they are given.
    for opcode in (pickle.BYTEARRAY8, pickle.ADDITEMS, pickle.EMPTY_SET, pickle.FROZENSET):
        del dispatch[opcode[0]]


class Pickles:
    """The pickle module for one file.

    left        bytes of the file that no storage has claimed yet
    claimed     the keys of the storages that the pickles speak of
    last        what the last pickle held: in files of old, the keys of the storages that follow
    """
    __name__ = __name__  # torch asks for it

    def __init__(self, size):
        self.left = size
        self.claimed = set()
        self.last = []
        self.Unpickler = type("Unpickler", (CountingUnpickler,), {"pickles": self})

    def load(self, file, **options):
        """As pickle.load: torch asks for it, for what stands around the tensors in files of old."""
        self.last = self.Unpickler(file, **options).load()
        if isinstance(self.last, list) and not all(isinstance(key, str) for key in self.last):
            raise ValueError("keys that are no text")
        return self.last

    def claim(self, key, size):
        """Count a storage. Raises ValueError where all together are larger than the file: torch would take
        memory for them before it looks."""
        if not isinstance(key, str):
            raise ValueError("a key that is no text")
        if key not in self.claimed:
            self.claimed.add(key)
            self.left -= size
        if size < 0 or self.left < 0:
            raise ValueError("more values than there are in the file")

    def check_all_there(self):
        """Raises ValueError where storages of a file of old don't follow: torch would leave in them what was
        in memory."""
        if not self.claimed <= set(self.last):
            raise ValueError("values are missing")


class CountingUnpickler(Unpickler):
    """An unpickler that counts the storages for its Pickles."""
    dispatch = dict(Unpickler.dispatch)

    def load_binpersid(self):
        """A storage, or, in files of old, a class beside its source."""
        of_what, *rest = self.stack[-1]
        if of_what in ("storage", b"storage"):
            kind, key, _, length, *view = rest
            self.pickles.claim(key, length * kind.dtype.itemsize)
            if view and view[0] is not None and not isinstance(view[0][0], str):
                raise ValueError("a key that is no text")
        super().load_binpersid()

    dispatch[pickle.BINPERSID[0]] = load_binpersid
    del dispatch[pickle.PERSID[0]]
