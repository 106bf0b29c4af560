"""Read the pickles that LeRobot's robot client sends, without unpickling them.

Unpickling calls what a message names: whoever reaches the port would run code. Here the bytes are read as what they
are, a list of operations, and only those that a client's two messages consist of are known:

    numbers, text, lists, tuples, dicts      are made as they are
    TimedObservation, RemotePolicyConfig     become a `Record`: a name and fields, not LeRobot's class
    NumPy arrays and numbers                 are made of their bytes here, by an allow-list of dtypes

A class or function in a message is only ever compared with these names. Nothing is imported, looked up or called, and
nothing larger is made than the message is: sizes that a message claims are checked before memory is taken.
"""

import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from geomcache.errors import RequestError

MAX_OPERATIONS = 5_000
"""A client's messages have a few hundred. Each can make an object, which takes more memory than its byte."""
MAX_DIMENSIONS = 4
PROTOCOLS = (4, 5)  # Python 3.12 and 3.13 send 4, Python 3.14 sends 5
DTYPES = frozenset({"b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"})


class Name(NamedTuple):
    """A class or function that a message names. It is compared, never looked up."""

    module: str
    name: str


_HELPERS = "lerobot.async_inference.helpers"
RECORDS = frozenset({Name(_HELPERS, "TimedObservation"), Name(_HELPERS, "RemotePolicyConfig")})
_NDARRAY, _DTYPE = Name("numpy", "ndarray"), Name("numpy", "dtype")
_RECONSTRUCT = Name("numpy._core.multiarray", "_reconstruct")
_SCALAR = Name("numpy._core.multiarray", "scalar")
_FROM_BUFFER = Name("numpy._core.numeric", "_frombuffer")
NAMES = RECORDS | {_NDARRAY, _DTYPE, _RECONSTRUCT, _SCALAR, _FROM_BUFFER}


@dataclass(eq=False)
class Record:
    """One of LeRobot's two messages: its class's name and its fields."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Array:
    """An array, from when it is named until its bytes come."""

    values: Any = None


@dataclass(eq=False)
class _DType:
    code: str


_MARK = object()


def read(data: bytes) -> Record:
    """Read a message.

    Args:
        data: a pickle of protocol 4 or 5.

    Returns:
        The record. Its fields are None, bool, int, float, str, list, tuple, dict, NumPy arrays that share the memory
        of `data`, and records.

    Raises:
        RequestError: the message is cut off or damaged, or has something in it that no client of LeRobot's sends.
    """
    result = _Reader(data).run()
    if not isinstance(result, Record):
        raise RequestError(f"message: expected one of LeRobot's, {_listed(RECORDS)}, got {type(result).__name__}")
    return result


class _Reader:
    """The state of reading: where in the bytes, what is on the stack, what was remembered."""

    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)
        self.at = 0
        self.stack: list[Any] = []
        self.memo: list[Any] = []

    def run(self) -> Any:
        for _ in range(MAX_OPERATIONS):
            code = bytes(self.take(1))
            if code == pickle.STOP:
                return _finished(self.pop())
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise RequestError(f"message: operation {code!r} at byte {self.at - 1} is none of LeRobot's")
            operation(self)
        raise RequestError(f"message: expected at most {MAX_OPERATIONS} operations, got more")

    def take(self, size: int) -> memoryview:
        """Return the next bytes."""
        if size > len(self.data) - self.at:
            raise RequestError(
                f"message: expected {size} bytes at byte {self.at}, found {len(self.data) - self.at}: it was cut off"
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> Any:
        """Return the next bytes as a number of a `struct` format."""
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self, size: int) -> str:
        try:
            return str(self.take(size), "utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"message: text that is no UTF-8 before byte {self.at}") from error

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise RequestError(f"message: byte {self.at - 1} takes a value where there is none")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        """Remove and return what was pushed since the last mark."""
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                values = self.stack[start + 1 :]
                del self.stack[start:]
                return values
        raise RequestError(f"message: byte {self.at - 1} goes back to a mark that there is not")

    def remembered(self, index: int) -> Any:
        if index >= len(self.memo):
            raise RequestError(f"message: byte {self.at - 1} refers to value {index} of {len(self.memo)}")
        return self.memo[index]

    def top(self, kind: type) -> Any:
        value = self.pop()
        if type(value) is not kind:
            raise RequestError(f"message: expected a {kind.__name__} before byte {self.at}, got {_kind(value)}")
        self.push(value)
        return value


def _protocol(reader: _Reader) -> None:
    version = reader.number("B")
    if version not in PROTOCOLS:
        raise RequestError(
            f"message: expected a pickle of protocol 4 or 5, got {version}: send with Python 3.12 or newer"
        )


def _frame(reader: _Reader) -> None:
    reader.take(8)  # a hint for reading files


def _memoize(reader: _Reader) -> None:
    value = reader.pop()
    reader.memo.append(value)
    reader.push(value)


def _long(reader: _Reader) -> None:
    reader.push(int.from_bytes(reader.take(reader.number("B")), "little", signed=True))


def _append(reader: _Reader) -> None:
    value = reader.pop()
    reader.top(list).append(value)


def _appends(reader: _Reader) -> None:
    values = reader.pop_to_mark()
    reader.top(list).extend(values)


def _set_item(reader: _Reader) -> None:
    value = reader.pop()
    key = reader.pop()
    _set(reader, [key, value])


def _set_items(reader: _Reader) -> None:
    _set(reader, reader.pop_to_mark())


def _set(reader: _Reader, items: list[Any]) -> None:
    target = reader.top(dict)
    if len(items) % 2 or not all(type(key) is str for key in items[::2]):
        raise RequestError(f"message: expected names and values of a dict before byte {reader.at}")
    target.update(zip(items[::2], items[1::2], strict=True))


def _tuple(size: int) -> Callable[[_Reader], None]:
    def make(reader: _Reader) -> None:
        values = [reader.pop() for _ in range(size)]
        reader.push(tuple(reversed(values)))

    return make


def _name(reader: _Reader) -> None:
    name, module = reader.pop(), reader.pop()
    if type(name) is not str or type(module) is not str:
        raise RequestError(f"message: expected the name of a class before byte {reader.at}, got {_kind(name)}")
    # Earlier NumPy pickled under `numpy.core`.
    found = Name(module.replace("numpy.core.", "numpy._core.", 1), name)
    if found not in NAMES:
        raise RequestError(f"message: expected nothing but {_listed(NAMES)}, got {module[:80]}.{name[:80]}: refused")
    reader.push(found)


def _new(reader: _Reader) -> None:
    """Begin a record: `copyreg.__newobj__`, as dataclasses are pickled."""
    arguments, name = reader.pop(), reader.pop()
    if not isinstance(name, Name) or name not in RECORDS or arguments != ():
        raise RequestError(f"message: expected a new {_listed(RECORDS)} before byte {reader.at}, got {_kind(name)}")
    reader.push(Record(name.name))


def _reduce(reader: _Reader) -> None:
    """Make what a name and its arguments stand for: one of NumPy's four forms."""
    arguments, name = reader.pop(), reader.pop()
    known = _REDUCTIONS.get(name) if isinstance(name, Name) else None
    if known is None or type(arguments) is not tuple:
        raise RequestError(f"message: expected an array before byte {reader.at}, got a call of {_kind(name)}: refused")
    reader.push(known(arguments))


def _build(reader: _Reader) -> None:
    """Fill in what was begun."""
    state = reader.pop()
    target = reader.pop()
    if type(target) is Record and type(state) is dict:
        target.fields = state
    elif type(target) is _DType and type(state) is tuple and len(state) >= 2 and state[1] in ("|", "<", "="):
        pass  # the byte order, and nothing for dtypes without parts
    elif type(target) is _Array and type(state) is tuple and len(state) == 5:
        _version, shape, dtype, fortran, content = state
        target.values = _array(content, dtype, shape, "F" if fortran is True else "C")
    else:
        raise RequestError(f"message: {_kind(target)} before byte {reader.at} cannot be filled with {_kind(state)}")
    reader.push(target)


def _dtype(arguments: tuple[Any, ...]) -> _DType:
    code = arguments[0] if arguments else None
    if type(code) is not str or code not in DTYPES:
        found = code[:40] if type(code) is str else _kind(code)
        raise RequestError(f"array: expected a dtype of {', '.join(sorted(DTYPES))}, got {found}")
    return _DType(code)


def _reconstruct(arguments: tuple[Any, ...]) -> _Array:
    if arguments != (_NDARRAY, (0,), b"b"):
        raise RequestError("array: expected NumPy's ndarray, got another class")
    return _Array()


def _from_buffer(arguments: tuple[Any, ...]) -> _Array:
    if len(arguments) != 4 or arguments[3] not in ("C", "F"):
        raise RequestError("array: expected bytes, dtype, shape and order")
    content, dtype, shape, order = arguments
    return _Array(_array(content, dtype, shape, order))


def _scalar(arguments: tuple[Any, ...]) -> bool | int | float:
    if len(arguments) != 2:
        raise RequestError("number: expected dtype and bytes")
    number: bool | int | float = _array(arguments[1], arguments[0], (1,), "C")[0].item()
    return number


def _array(content: Any, dtype: Any, shape: Any, order: str) -> Any:
    """Return an array over the bytes of the message.

    Raises:
        RequestError: the bytes are not as many as shape and dtype say.
    """
    if type(dtype) is not _DType or not isinstance(content, memoryview):
        raise RequestError(f"array: expected its dtype and bytes, got {_kind(dtype)} and {_kind(content)}")
    sides = shape if type(shape) is tuple and len(shape) <= MAX_DIMENSIONS else (None,)
    if not all(type(side) is int and 1 <= side < 2**31 for side in sides):
        raise RequestError(f"array: expected a shape of at most {MAX_DIMENSIONS} sides, got {_kind(shape)}")
    item = np.dtype("<" + dtype.code if dtype.code not in ("b1", "u1", "i1") else dtype.code)
    size = item.itemsize
    for side in sides:
        size *= side
    if size != len(content):
        raise RequestError(f"array: expected {size} bytes for {dtype.code} of shape {shape}, got {len(content)}")
    return np.frombuffer(content, dtype=item).reshape(sides, order=order)  # type: ignore[call-overload]


def _finished(value: Any) -> Any:
    """Return a record whose fields hold arrays and text instead of what they were read as.

    Only as deep as LeRobot's messages are: what is nested deeper stays as it was read, and is refused by whoever
    expects a number, a text or an array there.
    """
    if type(value) is Record:
        value.fields = {key: _plain(entry) for key, entry in value.fields.items()}
        for key, entry in value.fields.items():
            if type(entry) is dict:
                value.fields[key] = {name: _plain(each) for name, each in entry.items()}
    return value


def _plain(value: Any) -> Any:
    return value.values if type(value) is _Array else value


def _kind(value: Any) -> str:
    return f"{value.module}.{value.name}"[:160] if isinstance(value, Name) else type(value).__name__.strip("_")


def _listed(names: frozenset[Name]) -> str:
    return ", ".join(sorted(name.name for name in names))


_REDUCTIONS: dict[Name, Callable[[tuple[Any, ...]], Any]] = {
    _DTYPE: _dtype,
    _RECONSTRUCT: _reconstruct,
    _SCALAR: _scalar,
    _FROM_BUFFER: _from_buffer,
}
# The operations that Python's pickler uses for these messages in protocols 4 and 5, as in `pickletools`.
_OPERATIONS: dict[bytes, Callable[[_Reader], None]] = {
    pickle.PROTO: _protocol,
    pickle.FRAME: _frame,
    pickle.MEMOIZE: _memoize,
    pickle.MARK: lambda reader: reader.push(_MARK),
    pickle.NONE: lambda reader: reader.push(None),
    pickle.NEWTRUE: lambda reader: reader.push(True),
    pickle.NEWFALSE: lambda reader: reader.push(False),
    pickle.BININT: lambda reader: reader.push(reader.number("<i")),
    pickle.BININT1: lambda reader: reader.push(reader.number("B")),
    pickle.BININT2: lambda reader: reader.push(reader.number("<H")),
    pickle.LONG1: _long,
    pickle.BINFLOAT: lambda reader: reader.push(reader.number(">d")),
    pickle.SHORT_BINUNICODE: lambda reader: reader.push(reader.text(reader.number("B"))),
    pickle.BINUNICODE: lambda reader: reader.push(reader.text(reader.number("<I"))),
    pickle.SHORT_BINBYTES: lambda reader: reader.push(reader.take(reader.number("B"))),
    pickle.BINBYTES: lambda reader: reader.push(reader.take(reader.number("<I"))),
    pickle.BYTEARRAY8: lambda reader: reader.push(reader.take(reader.number("<Q"))),
    pickle.EMPTY_LIST: lambda reader: reader.push([]),
    pickle.APPEND: _append,
    pickle.APPENDS: _appends,
    pickle.EMPTY_DICT: lambda reader: reader.push({}),
    pickle.SETITEM: _set_item,
    pickle.SETITEMS: _set_items,
    pickle.EMPTY_TUPLE: _tuple(0),
    pickle.TUPLE1: _tuple(1),
    pickle.TUPLE2: _tuple(2),
    pickle.TUPLE3: _tuple(3),
    pickle.TUPLE: lambda reader: reader.push(tuple(reader.pop_to_mark())),
    pickle.BINGET: lambda reader: reader.push(reader.remembered(reader.number("B"))),
    pickle.LONG_BINGET: lambda reader: reader.push(reader.remembered(reader.number("<I"))),
    pickle.STACK_GLOBAL: _name,
    pickle.NEWOBJ: _new,
    pickle.REDUCE: _reduce,
    pickle.BUILD: _build,
}
