"""Test the package as shipped: build wheel and source distribution, inspect them, and run outside of the checkout."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.datasets import ROOT
from tests.support.stores import make_store

BUILD = "import sys, hatchling.build as backend; getattr(backend, sys.argv[1])(sys.argv[2])"  # as PEP 517 calls it
LARGEST_SDIST = 5_000_000


def build(kind: str, folder: Path) -> Path:
    """Build the checkout with ``build_wheel`` or ``build_sdist`` of pyproject.toml's build system."""
    subprocess.run([sys.executable, "-c", BUILD, kind, str(folder)], cwd=ROOT, check=True, capture_output=True)
    (made,) = folder.glob("geomcache-*")
    return made


def sources() -> set[str]:
    """List the files of geomcache/ that git keeps."""
    asked = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "geomcache"]
    return set(subprocess.run(asked, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_wheel", tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    assert "geomcache/py.typed" in names
    assert {name for name in names if ".dist-info/" not in name} == sources()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: zarr" in metadata


@pytest.mark.slow
def test_the_source_distribution_has_what_building_and_testing_need(tmp_path: Path) -> None:
    archive = build("build_sdist", tmp_path)
    assert archive.stat().st_size < LARGEST_SDIST
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    needed = {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "Makefile",
        "uv.lock",
        "PKG-INFO",
        "CITATION.cff",
    }
    needed |= {"examples/libero_object_demo/meta/info.json", "tests/support/stores.py", "pipelines/demo.sh"}
    assert needed | sources() <= names
    places = {name.partition("/")[0] for name in names if "/" in name}
    assert places <= {".ci", ".github", "benchmarks", "docs", "examples", "geomcache", "pipelines", "tests"}
    assert not [name for name in names if name.endswith((".safetensors", ".pyc", ".log"))]


@pytest.mark.slow
def test_the_wheel_runs_outside_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Run in a new environment, which finds the dependencies in this one's packages, and not the checkout."""
    place = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    install: list[str | Path] = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--disable-pip-version-check",
        wheel,
    ]
    subprocess.run([place / "bin" / "python", *install], check=True)
    (packages,) = place.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # its .pth files are not read
    cache = make_store(tmp_path / "cache.zarr")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*arguments: object) -> str:
        done = subprocess.run(
            list(map(str, arguments)), cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = run(place / "bin" / "python", "-c", "import geomcache; print(geomcache.__file__)")
    assert Path(found.strip()).is_relative_to(place)
    assert "extract" in run(place / "bin" / "geomcache", "--help")
    assert "geomcache 0." in run(place / "bin" / "geomcache", "--version")
    assert "90 there" in run(place / "bin" / "geomcache", "info", cache)
    assert "every file, frame and row as it was written" in run(place / "bin" / "geomcache", "verify", cache)
