"""Loaders of every start method, whose parent has read from the cache or not: no hang, no wrong number."""

import json
from pathlib import Path

import pytest

from tests.faults.common import Figure
from tests.support.stores import make_store, output_of, run_python

# A loader is a process that gets the store from its parent and reads batches at random. No zarr, no torch.
LOADERS = """
import json
import multiprocessing
import random
import sys
import time

from geomcache.cache.store import GeometryStore
from tests.support.stores import expected

def load(store, seed, results):
    generator = random.Random(seed)
    wrong = 0
    for _ in range(10):
        rows = [generator.randrange(90) for _ in range(8)]
        wanted = expected(store.spec, rows)
        wrong += not all((values == wanted[name]).all() for name, values in store.batch(rows).items())
    results.put(wrong)

def main():
    path, method, parent, loaders = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    store = GeometryStore.open(path)
    if parent == "read":
        store.batch([0, 20, 40, 60, 89])
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["geomcache.cache.store", "tests.support.stores"])
    wrong = hangs = 0
    for first in range(0, loaders, 4):
        results = context.Queue()
        children = [context.Process(target=load, args=(store, seed, results)) for seed in range(first, first + 4)]
        for child in children:
            child.start()
        wrong += sum(results.get(timeout=100) for _ in children)
        for child in children:
            child.join(timeout=100)
            hangs += child.exitcode is None
            assert child.exitcode in (0, None), child.exitcode
    print(json.dumps({"loaders": loaders, "wrong": wrong, "hangs": hangs}))

if __name__ == "__main__":
    main()
"""


LONG = (pytest.mark.slow, pytest.mark.timeout(1800))


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("parent", ["read", "not"])
@pytest.mark.parametrize(
    ("method", "loaders"),
    [
        ("fork", 4),
        pytest.param("fork", 200, marks=LONG),
        pytest.param("forkserver", 200, marks=LONG),
        pytest.param("spawn", 200, marks=LONG),
    ],
)
def test_loaders_of_every_start_method_read_what_was_written(
    tmp_path: Path, method: str, parent: str, loaders: int, codec: str, figure: Figure
) -> None:
    path = make_store(tmp_path / "cache", codec=codec)
    script = tmp_path / "script.py"
    script.write_text(LOADERS)
    program = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    facts = json.loads(output_of(run_python(program, script, path, method, parent, loaders), timeout=1800))
    assert (facts["wrong"], facts["hangs"]) == (0, 0)
    figure(f"{facts}")
