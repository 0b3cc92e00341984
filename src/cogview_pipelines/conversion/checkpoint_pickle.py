"""
The pickle of a checkpoint, read without Python's unpickler.

A pickle is a program for a small stack machine, and the unpickler runs it: calls whatever it names, and takes the
memory that it asks for (one opcode may ask for gigabytes, one line of them for a hash that takes years). This machine
knows the same opcodes, but a name stands for what `find_global` gives for it, calls reach those alone, and everything
is counted. `pickletools` of the standard library takes the bytes apart.
"""

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from .errors import ConversionError

MAX_PICKLE_BYTES = 2**24
MAX_OPCODES = 2**19  # a checkpoint of a thousand tensors has about 40,000
MAX_ARGUMENTS = 2**6  # of a call, or sizes of a tensor


class Placeholder:
    """Stands for an object that is neither tensor nor container; whatever is done to it leaves nothing."""

    __slots__ = ()


PLACEHOLDER = Placeholder()


class Constructor:
    """What a global name stands for: called with the pickle's arguments."""

    __slots__ = ("build",)

    def __init__(self, build: Callable[..., Any]):
        self.build = build


class _TooMuch(Exception):
    """A bound is exceeded; the text says which."""


class _BoundedFile:
    """As much of a file as a pickle may be long; a length that the file does not have allocates nothing."""

    def __init__(self, file: BinaryIO):
        self._file, self._left = file, MAX_PICKLE_BYTES

    def read(self, count: int) -> bytes:
        return self._take(b"" if count < 1 else self._file.read(min(count, self._left)))

    def readline(self) -> bytes:
        return self._take(self._file.readline(self._left))

    def tell(self) -> int:
        return self._file.tell()

    def _take(self, data: bytes) -> bytes:
        self._left -= len(data)
        if not self._left:
            raise _TooMuch(f"its pickle is longer than {MAX_PICKLE_BYTES} bytes, which no list of tensors is")
        return data


def load(
    file: BinaryIO, name: str, find_global: Callable[[str, str], Any], load_persistent: Callable[[Any], Any]
) -> Any:
    """
    Read one pickle; the file then stands behind it.

    Args:
        file (binary file): Stands at the pickle.
        name (`str`): Of the file, for messages.
        find_global: `(module, name)` to what this name stands for: a [`Constructor`], the [`Placeholder`], or a value.
        load_persistent: The same for what torch keeps outside of the pickle, the storages.

    Raises:
        ConversionError: If it is damaged or larger than that of any checkpoint; or one of the two functions does.
    """
    machine = _Machine(find_global, load_persistent)
    count = 0
    try:
        for opcode, argument, _ in pickletools.genops(cast(BinaryIO, _BoundedFile(file))):
            count += 1
            if count > MAX_OPCODES:
                raise _TooMuch(f"its pickle has more than {MAX_OPCODES:,} steps, which no list of tensors has")
            machine.run(opcode.name, argument)
        return machine.stack.pop()
    except ConversionError:
        raise
    except _TooMuch as error:
        raise ConversionError(f"{name} cannot be read: {error}.") from None
    except (ValueError, TypeError, LookupError, OverflowError, MemoryError) as error:
        raise ConversionError(
            f"{name} cannot be read: its pickle is damaged ({type(error).__name__}: {str(error)[:200]})."
        ) from error


_VALUES = {
    *("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}
_NOTHING = {"PROTO", "FRAME", "STOP"}


class _Machine:
    """The stack, the marks in it, and what the pickle remembers by number."""

    def __init__(self, find_global, load_persistent):
        self.find_global, self.load_persistent = find_global, load_persistent
        self.stack: list = []
        self.below_marks: list[list] = []
        self.memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        """Do one step."""
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memo[argument])
        elif name not in _NOTHING:
            step = getattr(self, f"_{name.lower()}", None)
            if step is None:  # an extension registry, buffers that are kept elsewhere
                raise _TooMuch(f"its pickle uses `{name}`, which no checkpoint does")
            step(argument)

    def _items(self) -> list:
        """What stands above the last mark."""
        items, self.stack = self.stack, self.below_marks.pop()
        return items

    def _mark(self, _):
        self.below_marks.append(self.stack)
        self.stack = []

    def _pop(self, _):
        if self.stack:
            self.stack.pop()
        else:
            self._items()

    def _pop_mark(self, _):
        self._items()

    def _dup(self, _):
        self.stack.append(self.stack[-1])

    def _memoize(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    # Containers

    def _append(self, _):
        value = self.stack.pop()
        _extend(self.stack[-1], [value])

    def _appends(self, _):
        values = self._items()
        _extend(self.stack[-1], values)

    _additems = _appends

    def _list(self, _):
        values = self._items()
        self.stack.append(values)

    _frozenset = _list  # sets are of no interest; hashing what is in them could take for ever

    def _tuple(self, _):
        values = self._items()
        self.stack.append(tuple(values))

    def _take(self, count: int):
        values = tuple(self.stack[-count:])
        if len(values) < count:
            raise IndexError("the stack is empty")
        del self.stack[-count:]
        self.stack.append(values)

    def _tuple1(self, _):
        self._take(1)

    def _tuple2(self, _):
        self._take(2)

    def _tuple3(self, _):
        self._take(3)

    def _dict(self, _):
        values = self._items()
        self.stack.append({})
        _set_items(self.stack[-1], values[::2], values[1::2])

    def _setitem(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], [key], [value])

    def _setitems(self, _):
        values = self._items()
        _set_items(self.stack[-1], values[::2], values[1::2])

    # Names and calls

    def _global(self, argument):
        self.stack.append(self.find_global(*argument.split(" ", 1)))

    def _stack_global(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("a name must be text")
        self.stack.append(self.find_global(module, name))

    def _inst(self, argument):
        arguments = self._items()
        self.stack.append(_call(self.find_global(*argument.split(" ", 1)), arguments))

    def _obj(self, _):
        function, *arguments = self._items()
        self.stack.append(_call(function, arguments))

    def _reduce(self, _):
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(_call(function, arguments))

    _newobj = _reduce

    def _newobj_ex(self, _):
        self.stack.pop()
        self._reduce(None)

    def _build(self, _):
        self.stack.pop()  # a state, for an object that has none here

    def _persid(self, argument):
        self.stack.append(self.load_persistent(argument))

    def _binpersid(self, _):
        self.stack.append(self.load_persistent(self.stack.pop()))


def _extend(target, values: list) -> None:
    if isinstance(target, list):
        target.extend(values)
    elif not isinstance(target, Placeholder):
        raise TypeError("only lists can be appended to")


def _set_items(target, keys: list, values: list) -> None:
    if isinstance(target, Placeholder):
        return
    if not isinstance(target, dict) or len(keys) != len(values):
        raise TypeError("only dicts have entries")
    for key, value in zip(keys, values):
        # other keys, such as tuples of tuples, are of no interest; their hash could take for ever
        if isinstance(key, str | float) or (isinstance(key, int) and abs(key) < 2**63):
            target[key] = value


def _call(function, arguments):
    if isinstance(function, Placeholder):
        return PLACEHOLDER
    if not isinstance(function, Constructor) or not isinstance(arguments, list | tuple):
        raise TypeError("only classes can be called")
    if len(arguments) > MAX_ARGUMENTS:
        raise _TooMuch("its pickle calls with too many arguments")
    return function.build(*arguments)


def make_mapping(pairs: list | None = None) -> dict:
    """
    An `OrderedDict`. Old ones are made of a list of pairs, which is emptied: a pickle could name it a million times.
    """
    result: dict = {}
    if pairs is not None:
        if not isinstance(pairs, list):
            raise TypeError("an `OrderedDict` is made of a list of pairs")
        _set_items(result, [key for key, _ in pairs], [value for _, value in pairs])
        pairs.clear()
    return result
