"""Files that a command makes for people: the name is checked before the work, a file is there whole or not at all."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from geomcache.errors import UserInputError


def check_output(path: Path, suffixes: Sequence[str]) -> None:
    """See that a file can be written.

    Raises:
        UserInputError: its name ends in none of the suffixes, or its folder cannot be written to.
    """
    if path.suffix.lower() not in suffixes:
        raise UserInputError(
            f"output {path}: expected a name that ends in {', '.join(suffixes)}, got {path.suffix or 'no suffix'}"
        )
    if path.is_dir():
        raise UserInputError(f"output {path}: expected a file, found a folder: name a file in it")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserInputError(f"output {path}: expected the folder {folder}, found none: make it, or name another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserInputError(f"output {path}: expected a folder to write to, {folder} may not be written to")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when all is well and vanishes when not."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
