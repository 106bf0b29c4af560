"""Messages that would run code, take memory or crash whoever unpickles them, and mutations of messages."""

import os
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import torch


class _Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def hostile_messages(planted: Path) -> dict[str, bytes]:
    """Pickles by what they try; those that run code would write the file `planted`."""
    command = f"touch {planted}"
    code = f"open({str(planted)!r}, 'w').close()"
    text = command.encode()
    protocol = pickle.PROTO + b"\x04"

    def names(module: str, name: str) -> bytes:
        return b"".join(pickle.SHORT_BINUNICODE + bytes([len(part)]) + part.encode() for part in (module, name))

    helpers = names("lerobot.async_inference.helpers", "TimedObservation")
    begun = protocol + helpers + pickle.STACK_GLOBAL + pickle.EMPTY_TUPLE + pickle.NEWOBJ
    array = names("numpy._core.multiarray", "_reconstruct") + pickle.STACK_GLOBAL
    return {
        "os.system": pickle.dumps(_Calls(os.system, command)),
        "eval": pickle.dumps(_Calls(eval, code)),
        "exec": pickle.dumps(_Calls(exec, code)),
        "exec, protocol 0": pickle.dumps(_Calls(exec, code), protocol=0),
        "exec, protocol 2": pickle.dumps(_Calls(exec, code), protocol=2),
        "in an observation": pickle.dumps({"observation": _Calls(os.system, command)}),
        "a name with dots": protocol + names("builtins", "eval.__call__") + pickle.STACK_GLOBAL + pickle.STOP,
        "inst": b"(S'" + text + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'" + text + b"'\no.",
        "global": b"cos\nsystem\n(S'" + text + b"'\ntR.",
        "extension": protocol + pickle.EXT1 + b"\x01" + pickle.STOP,
        "persistent": protocol + pickle.NONE + pickle.BINPERSID + pickle.STOP,
        "torch.load": pickle.dumps(torch.zeros(2)),
        "a call of a record": protocol
        + helpers
        + pickle.STACK_GLOBAL
        + pickle.EMPTY_TUPLE
        + pickle.REDUCE
        + pickle.STOP,
        "attributes of a class": protocol
        + helpers
        + pickle.STACK_GLOBAL
        + pickle.EMPTY_DICT
        + pickle.BUILD
        + pickle.STOP,
        "attributes of a function": protocol
        + array
        + pickle.NONE
        + pickle.EMPTY_DICT
        + pickle.TUPLE2
        + pickle.BUILD
        + pickle.STOP,
        "4 GB of bytes": begun + pickle.BINBYTES + struct.pack("<I", 2**32 - 1) + b"x" + pickle.STOP,
        "an exabyte": begun + pickle.BYTEARRAY8 + struct.pack("<Q", 2**60) + b"x" + pickle.STOP,
        "a far memo": begun + pickle.LONG_BINPUT + struct.pack("<I", 2**31) + pickle.STOP,
        "a far memo, read": begun + pickle.LONG_BINGET + struct.pack("<I", 2**31) + pickle.STOP,
        "a huge number": protocol + pickle.LONG4 + struct.pack("<i", 2**31 - 1) + b"\x01" + pickle.STOP,
        "a negative length": protocol + pickle.LONG4 + struct.pack("<i", -1) + pickle.STOP,
        "nothing but marks": protocol + pickle.MARK * 30_000 + pickle.STOP,
        "deep nesting": protocol + pickle.EMPTY_LIST * 15_000 + pickle.APPEND * 14_999 + pickle.STOP,
        "an empty stack": protocol + pickle.APPEND + pickle.STOP,
        "a huge array": protocol
        + array
        + names("numpy", "ndarray")
        + pickle.STACK_GLOBAL
        + (pickle.BININT + struct.pack("<i", 2**31 - 1)) * 2
        + pickle.TUPLE2
        + pickle.SHORT_BINBYTES
        + b"\x01b"
        + pickle.TUPLE3
        + pickle.REDUCE
        + pickle.STOP,
        "empty": b"",
        "no pickle": b"GET / HTTP/1.1\r\n\r\n",
    }


def mutated(message: bytes, choice: random.Random) -> bytes:
    """Return the message with a few changes: bytes, lengths, order, cuts, operations."""
    data = bytearray(message)
    for _ in range(choice.randint(1, 4)):
        at = choice.randrange(len(data) + 1)
        kind = choice.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] = choice.randrange(256)
        elif kind == 1 and data:
            data[at % len(data)] ^= 1 << choice.randrange(8)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            other = choice.randrange(len(data) + 1)
            data[at:at] = data[min(at, other) : min(at, other) + choice.randrange(64)]
        elif kind == 4:
            data[at:at] = bytes([choice.choice(_OPERATIONS)])
        else:
            data[at : at + 4] = struct.pack("<I", choice.choice((0, 1, 2**16, 2**31, 2**32 - 1)))
    return bytes(data)


_OPERATIONS = b"".join(
    value for name, value in vars(pickle).items() if name.isupper() and isinstance(value, bytes) and len(value) == 1
)
