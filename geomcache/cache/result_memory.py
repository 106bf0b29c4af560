"""Memory of large results, used again once nobody holds the result any more.

What the system hands out fresh it fills with zeros first, page by page: for a batch of large maps that takes half as
long as reading them. A training loop lets go of one batch before it asks for the next but one.
"""

from math import prod

import numpy as np
from numpy.typing import NDArray

_LEAST = 4 << 20  # bytes; smaller pieces come from the allocator's own lists
_KEPT = 4  # unused pieces: the outputs of one batch


class ResultMemory:
    """Pieces of memory that arrays have given back. For many threads of one process."""

    def __init__(self) -> None:
        # By their bytes. No lock: a piece is given back wherever the last reference to it goes, perhaps in the middle
        # of `empty` in the same thread. Each step on its own is one of the interpreter's.
        self._unused: dict[int, list[NDArray[np.uint8]]] = {}

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.float16]:
        """An array of this shape with any content, little-endian and writable, as `numpy.empty` gives it."""
        nbytes = 2 * prod(shape)
        if nbytes < _LEAST:
            return np.empty(shape, "<f2")
        try:
            piece = self._unused[nbytes].pop()
        except LookupError:
            piece = np.empty(nbytes, np.uint8)
        return np.frombuffer(_Lent(self, piece), "<f2").reshape(shape)

    def take_back(self, piece: NDArray[np.uint8]) -> None:
        """Keep a piece for the next array of its size; where there are enough, only this one."""
        if sum(map(len, [*self._unused.values()])) >= _KEPT:
            self._unused.clear()  # of another batch size, most likely
        self._unused.setdefault(piece.nbytes, []).append(piece)


class _Lent:
    """A piece in use. Every array, tensor and view of it holds the buffer, and the buffer holds this."""

    def __init__(self, memory: ResultMemory, piece: NDArray[np.uint8]) -> None:
        self._memory, self._piece = memory, piece

    def __buffer__(self, flags: int) -> memoryview:
        return memoryview(self._piece)

    def __del__(self) -> None:
        self._memory.take_back(self._piece)
