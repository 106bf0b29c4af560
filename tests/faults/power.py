"""A disk that loses power: operations are logged while a writer works, then replayed into what a disk may hold.

The model is stricter than most file systems: until a file is fsynced each of its writes may be lost, torn or kept, in
any combination; until a folder is fsynced each change of its names may be lost or kept, likewise. A file's fsync does
not make its name durable.
"""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from geomcache.cache import durable

Choice = Callable[[], float]
"""How much of the next operation that was not synchronised survives: 0 nothing, 1 all, in between a part."""


@dataclass
class Inode:
    """A file: what is on the disk, and the changes that may not be."""

    content: bytes
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # (offset, data), or (length, None): cut off

    def sync(self) -> None:
        self.content, self.pending = self.after(lambda: 1.0), []

    def after(self, choice: Choice) -> bytes:
        content = bytearray(self.content)
        for at, data in self.pending:
            share = choice()
            if data is None:
                if share >= 0.5:
                    del content[at:]
                continue
            part = data[: round(share * len(data))]
            if part:
                content.extend(bytes(max(0, at - len(content))))
                content[at : at + len(part)] = part
        return bytes(content)


class Disk:
    """A folder as a disk has it, from a folder that is durable and operations on it."""

    def __init__(self, folder: Path) -> None:
        self.folders = [path.relative_to(folder) for path in folder.rglob("*") if path.is_dir()]
        files = [path for path in folder.rglob("*") if path.is_file()]
        self.durable = {path.relative_to(folder): Inode(path.read_bytes()) for path in files}
        self.names = dict(self.durable)  # as processes see it
        self.pending: dict[
            Path, list[tuple[Path | None, Path | None, Inode]]
        ] = {}  # (name that goes, that comes, file)

    def apply(self, operation: tuple[Any, ...]) -> None:
        kind, path, *rest = operation
        if kind == "create":
            self._rename(None, path, Inode(b""))
        elif kind == "write":
            self.names[path].pending.append((rest[0], rest[1]))
        elif kind == "truncate":
            self.names[path].pending.append((rest[0], None))
        elif kind == "rename":
            self._rename(path, rest[0], self.names[path])
        elif kind == "unlink":
            self._rename(path, None, self.names[path])
        elif kind == "sync" and path in self.names:
            self.names[path].sync()
        elif kind == "sync":
            for change in self.pending.pop(path, []):
                _change(self.durable, *change)
        else:
            raise AssertionError(operation)

    def _rename(self, gone: Path | None, come: Path | None, inode: Inode) -> None:
        _change(self.names, gone, come, inode)
        parent = (gone or come or Path()).parent
        self.pending.setdefault(parent, []).append((gone, come, inode))

    def write_to(self, folder: Path, choice: Choice) -> None:
        """What is there after the power came back."""
        names = dict(self.durable)
        for changes in self.pending.values():
            for change in changes:
                if choice() >= 0.5:
                    _change(names, *change)
        folder.mkdir()
        for path in self.folders:
            (folder / path).mkdir(parents=True, exist_ok=True)
        for path, inode in names.items():
            (folder / path).write_bytes(inode.after(choice))


def _change(names: dict[Path, Inode], gone: Path | None, come: Path | None, inode: Inode) -> None:
    if gone is not None:
        names.pop(gone, None)
    if come is not None:
        names[come] = inode


class Recorder:
    """The file operations of `durable` on one folder, in order."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.operations: list[tuple[Any, ...]] = []
        self._folder = folder
        self._upstream = {name: getattr(durable, name) for name in ("open_file", "write", "rename", "unlink")}
        for name in ("open_file", "write", "fsync", "truncate", "rename", "unlink"):
            patch.setattr(durable, name, getattr(self, f"_{name}"))

    def _add(self, kind: str, path: Path | int, *rest: Any) -> None:
        if isinstance(path, int):
            path = Path(f"/proc/self/fd/{path}").readlink()
        self.operations.append((kind, path.relative_to(self._folder), *rest))

    def _open_file(self, path: Path, flags: int) -> int:
        if path.exists():
            if flags & os.O_TRUNC:
                self._add("truncate", path, 0)
        else:
            self._add("create", path)
        return int(self._upstream["open_file"](path, flags))

    def _write(self, descriptor: int, data: memoryview) -> int:
        # All of our writes are at the end of a file: it is new, or opened for appending.
        self._add("write", descriptor, os.fstat(descriptor).st_size, bytes(data))
        return int(self._upstream["write"](descriptor, data))

    def _fsync(self, descriptor: int) -> None:
        self._add("sync", descriptor)  # and not down to the disk: nothing here needs it

    def _truncate(self, descriptor: int, length: int) -> None:
        self._add("truncate", descriptor, length)
        os.ftruncate(descriptor, length)

    def _rename(self, source: Path, target: Path) -> None:
        self._add("rename", source, target.relative_to(self._folder))
        self._upstream["rename"](source, target)

    def _unlink(self, path: Path) -> None:
        if path.exists():
            self._add("unlink", path)
        self._upstream["unlink"](path)


def choices(generator: random.Random, count: int) -> list[Choice]:
    """Ways of losing power: all lost, all kept, names with half of the data, half of the data alone, then at random."""
    fixed: list[Choice] = [lambda: 0.0, lambda: 1.0, lambda: 0.5, lambda: 0.49]
    return (fixed + [lambda: generator.choice((0.0, 1.0, generator.random()))] * count)[:count]
