"""Memory that is used again never changes under an array that somebody still holds."""

import gc
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from geomcache.cache.result_memory import ResultMemory
from geomcache.cache.store import GeometryStore
from tests.support.stores import expected, make_spec, make_store

SHAPE = (2, 1 << 20)  # 4 MiB
SMALL = (2, 3)


def address(array: np.ndarray) -> int:  # type: ignore[type-arg]
    return int(array.__array_interface__["data"][0])


def test_memory_is_used_again_when_nobody_holds_it() -> None:
    memory = ResultMemory()
    array = memory.empty(SHAPE)
    assert (array.dtype, array.shape) == (np.dtype("<f2"), SHAPE)
    assert array.flags.writeable
    assert array.flags.c_contiguous
    first = address(array)
    other = memory.empty(SHAPE)
    assert address(other) != first
    del array
    assert address(memory.empty(SHAPE)) == first
    assert address(memory.empty((1 << 20, 2))) == first  # of as many bytes
    assert address(memory.empty((3, 1 << 20))) != first


@pytest.mark.parametrize(
    "hold",
    [
        lambda array: array[1:],
        lambda array: array.view(np.uint8).reshape(-1)[5:],
        lambda array: memoryview(array),
        torch.from_numpy,
        lambda array: torch.from_numpy(array)[1, ::2],
        lambda array: [array],
    ],
    ids=["slice", "view", "memoryview", "tensor", "part of a tensor", "list"],
)
def test_whatever_looks_at_it_holds_it(hold) -> None:  # type: ignore[no-untyped-def]
    memory = ResultMemory()
    array = memory.empty(SHAPE)
    first = address(array)
    held = hold(array)
    del array
    gc.collect()
    assert address(memory.empty(SHAPE)) != first
    del held
    gc.collect()
    assert first in {address(one) for one in [memory.empty(SHAPE), memory.empty(SHAPE)]}


def test_few_pieces_are_kept_and_small_ones_not_at_all() -> None:
    memory = ResultMemory()
    for rows in range(2, 30):
        memory.empty((rows, 1 << 20))
    arrays = [memory.empty(SHAPE) for _ in range(20)]
    del arrays
    assert sum(map(len, memory._unused.values())) <= 4
    memory = ResultMemory()
    memory.empty(SMALL)
    assert not memory._unused


def test_batches_that_are_held_keep_their_numbers(tmp_path: Path) -> None:
    spec = make_spec(grid_hw=(128, 128), outputs=("ray",))
    store = GeometryStore.open(make_store(tmp_path / "cache", spec=spec, lengths=(32,)))
    drawn = [np.random.default_rng(seed).integers(0, 32, 16) for seed in range(12)]
    wanted = expected(spec, range(32))["ray"]
    kept = []
    for at, rows in enumerate(drawn):
        tensor = torch.from_numpy(store.batch(rows).ray)
        if at % 3 == 0:
            kept.append((rows, tensor))
    assert len({tensor.data_ptr() for _, tensor in kept}) == len(kept)
    for rows, tensor in kept:
        np.testing.assert_array_equal(tensor.numpy(), wanted[rows])


def test_threads_never_share_a_piece() -> None:
    memory = ResultMemory()
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(100):
            array = memory.empty(SHAPE)
            array[:, ::4096] = number
            if (array[:, ::4096] != number).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
