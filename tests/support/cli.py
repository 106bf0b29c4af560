"""The command line, called in this process."""

import sys
import typing

import pytest

from geomcache.cli import main as cli


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Return the exit code of `geomcache ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["geomcache", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return typing.cast("int", left.value.code or 0)
