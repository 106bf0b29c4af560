"""Test the Python API: names are imported late, and the document's examples run from top to bottom."""

import contextlib
import importlib
import io
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

import geomcache
from geomcache import progress
from geomcache.errors import CacheNotFoundError
from tests.support.datasets import DEMO, ROOT
from tests.support.stores import make_store

DOCUMENT = ROOT / "docs" / "python-api.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = "import sys, geomcache; print(sorted({'torch', 'numpy', 'zarr', 'lerobot'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_are_those_of_their_modules() -> None:
    assert dir(geomcache) == sorted(geomcache.__all__)
    for name, module in geomcache._MODULES.items():
        assert getattr(geomcache, name) is getattr(importlib.import_module(module), name)
    assert {*geomcache._MODULES, "open"} == set(geomcache.__all__)
    with pytest.raises(AttributeError, match="no attribute 'GeometryStor'"):
        _ = geomcache.GeometryStor  # type: ignore[attr-defined]


def test_open_gives_a_store(tmp_path: Path) -> None:
    store = geomcache.open(make_store(tmp_path / "cache.zarr"))
    assert isinstance(store, geomcache.GeometryStore)
    assert store.sealed
    with pytest.raises(CacheNotFoundError):
        geomcache.open(str(tmp_path / "none.zarr"))


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "geomcache" / "py.typed").is_file()


def test_the_documents_examples_print_what_they_say(
    random_da3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").symlink_to(DEMO.parent)
    (tmp_path / "DA3-SMALL").symlink_to(random_da3_folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "LINE_EVERY_S", float("inf"))  # progress lines, which only a slow machine prints
    logging.getLogger("lerobot").setLevel(logging.ERROR)
    text = DOCUMENT.read_text()
    names: dict[str, object] = {}
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == 7
    for block in blocks:
        source = block[1]
        lines = "\n" * text.count("\n", 0, block.start(1))  # so that a traceback has the document's line numbers
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(lines + source, str(DOCUMENT), "exec"), names)
        expected = re.findall(r"^\s*print\(.*\)  # (.+)$", source, re.MULTILINE)
        assert len(expected) == len(re.findall(r"^\s*print\(", source, re.MULTILINE))
        assert printed.getvalue().splitlines() == expected
