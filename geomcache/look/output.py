"""Files that a command makes for people: names are checked before the work, and no incomplete file is left."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from geomcache.errors import UserInputError


def check_output(path: Path, suffixes: Sequence[str]) -> None:
    """Check that a file can be written.

    Raises:
        UserInputError: its name ends in none of the suffixes, or its folder cannot be written to.
    """
    if path.suffix.lower() not in suffixes:
        raise UserInputError(
            f"output {path}: expected a name that ends in {', '.join(suffixes)}, got {path.suffix or 'no suffix'}"
        )
    if path.is_dir():
        raise UserInputError(f"output {path}: expected a file, found a folder: choose a file in it")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserInputError(f"output {path}: expected the folder {folder}, found none: create it, or choose another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserInputError(
            f"output {path}: expected a writable folder, found {folder} without permission: choose another"
        )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file to write. It replaces `path` on success, and is removed otherwise."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
