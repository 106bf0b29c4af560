"""Every file operation that can fail, fails: full disk, I/O error, short write, read-only, once and for good."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from geomcache.cache import durable
from geomcache.errors import OutOfSpaceError
from tests.faults.common import SHORT, Figure, few_or_many, finish, held_rows
from tests.support.stores import Faults, fill, make_store, open_writer


class FailingOperations:
    """From the n-th file operation on they fail, one of them or all that follow."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count, self.first, self.last, self.code = 0, 0, -1, 0
        for name in Faults.OPERATIONS:
            patch.setattr(durable, name, self._wrap(name, getattr(durable, name)))

    def start(self, first: int, last: int, code: int) -> None:
        """These operations fail, by number, counted from 0 again; code 0: writes are cut short, and work otherwise."""
        self.count, self.first, self.last, self.code = 0, first, last, code

    def _wrap(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            fails = self.first <= self.count <= self.last
            self.count += 1
            if fails and self.code:
                raise OSError(self.code, os.strerror(self.code))
            if fails and name == "write" and len(arguments[1]) > 1:
                return operation(arguments[0], arguments[1][: len(arguments[1]) // 2])
            return operation(*arguments)

        return wrapped


FOR_GOOD = 1 << 30
FAULTS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS, "short write": 0}


@few_or_many("step", 23, 1)
@pytest.mark.parametrize("start", ["nothing", "empty", "half"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("lasting", ["once", "for good"])
def test_a_file_operation_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, lasting: str, start: str, step: int, figure: Figure
) -> None:
    """One line names the file; what is read is right; the next run finishes."""
    original = tmp_path / "original"
    if start == "half":
        make_store(original, [(8, 24)], lengths=SHORT)
    elif start == "empty":
        open_writer(original, lengths=SHORT).close()
    operations, code = FailingOperations(monkeypatch), FAULTS[fault]
    at = covered = 0
    while True:
        folder = tmp_path / str(at)
        folder.mkdir()
        path = folder / "cache"
        if original.exists():
            shutil.copytree(original, path)
        operations.start(at, at if lasting == "once" else FOR_GOOD, code)
        try:
            with open_writer(path, lengths=SHORT) as writer:
                fill(writer)
                assert writer.seal()
        except OSError as error:
            assert code, "a short write is no error"
            assert isinstance(error, OutOfSpaceError) == (code == errno.ENOSPC)
            assert str(folder) in str(error)
            assert "\n" not in str(error)
        reached = operations.count
        operations.start(0, -1, 0)
        if path.exists():
            held_rows(path)
        finish(path, SHORT)
        assert {*folder.iterdir()} == {path}  # nothing was left beside it
        shutil.rmtree(folder)
        if reached <= at:
            break
        covered += 1
        at += step
    assert covered * step > 60
    figure(f"{covered} operations")


SMALL_DISK = """
import json, subprocess, sys
from pathlib import Path
from geomcache.errors import OutOfSpaceError
from tests.faults.common import LONG, finish, held_rows
from tests.support.stores import fill, open_writer

disk = Path(sys.argv[1])

def mount(*options):
    subprocess.run(["mount", "-t", "tmpfs", *options], check=True)

facts = {"full": 0, "rows": []}
mount("-o", "size=128k", "small", str(disk))
path = disk / "cache"
for kilobytes in (128, 160, 200, 256, 320, 400):
    mount("-o", f"remount,size={kilobytes}k", "small", str(disk))
    try:
        with open_writer(path, lengths=LONG) as writer:
            fill(writer)
            writer.seal()
    except OutOfSpaceError as error:
        assert str(disk) in str(error) and "\\n" not in str(error), error
        facts["full"] += 1
    if path.exists():
        facts["rows"].append(len(held_rows(path)))
mount("-o", "remount,size=8m", "small", str(disk))
finish(path, LONG)
mount("-o", "remount,ro", "small", str(disk))
assert len(held_rows(path)) == sum(LONG)
try:
    open_writer(path, lengths=LONG)
except OSError as error:
    facts["read-only"] = str(error)
print(json.dumps(facts))
"""


def private_mounts() -> bool:
    tool = shutil.which("unshare")
    if tool is None or os.geteuid() != 0:
        return False
    return subprocess.run([tool, "--mount", "true"], check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(not private_mounts(), reason="needs root and mount namespaces, to mount a small tmpfs")
def test_a_small_disk_that_fills_up_and_one_that_cannot_be_written(tmp_path: Path, figure: Figure) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = tmp_path / "script.py"
    script.write_text(SMALL_DISK)
    # In a mount namespace of its own: the mounts end with the process.
    process = subprocess.run(
        ["unshare", "--mount", sys.executable, script, disk],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    facts = json.loads(process.stdout)
    assert facts["full"] >= 3
    assert facts["rows"] == sorted(facts["rows"])  # nothing acknowledged is lost by the next full disk
    assert "Read-only file system" in facts["read-only"]
    assert str(disk) in facts["read-only"]
    figure(f"full {facts['full']} times, rows there after each run {facts['rows']}")


def test_the_operations_that_are_made_to_fail_are_those_that_a_run_uses() -> None:
    """A new primitive in durable.py joins the list."""
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(durable))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    changes = {"open", "write", "fsync", "ftruncate", "rename", "unlink", "rmtree", "replace", "hardlink_to", "mkdir"}
    changes |= {"renameat2"}
    direct = {
        name
        for name, node in functions.items()
        for call in ast.walk(node)
        if isinstance(call, ast.Call)
        and (call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")) in changes
        and not (isinstance(call.func, ast.Name) and call.func.id in functions)
    }
    assert direct - {"sync_folder"} == {*Faults.OPERATIONS}
