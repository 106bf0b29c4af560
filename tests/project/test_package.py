"""Test the package as shipped: build wheel and source distribution, inspect them, and run outside of the checkout."""

import ast
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support.datasets import ROOT
from tests.support.stores import make_store

BUILD = "import sys, hatchling.build as backend; getattr(backend, sys.argv[1])(sys.argv[2])"  # as PEP 517 calls it
LARGEST_SDIST = 5_000_000


PLUGIN = "lerobot_policy_pi05_geometry"


def build(kind: str, folder: Path, project: Path = ROOT, name: str = "geomcache") -> Path:
    """Build a project with ``build_wheel`` or ``build_sdist`` of its pyproject.toml's build system."""
    subprocess.run([sys.executable, "-c", BUILD, kind, str(folder)], cwd=project, check=True, capture_output=True)
    (made,) = folder.glob(f"{name}-*")
    return made


def sources() -> set[str]:
    """List the files of geomcache/ that git keeps."""
    asked = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "geomcache"]
    return set(subprocess.run(asked, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split())


def install(place: Path, *wheels: Path) -> Path:
    """Install wheels into a new environment, which finds their dependencies in this one's packages."""
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    options = ["--quiet", "--no-index", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([place / "bin" / "python", "-m", "pip", "install", *options, *wheels], check=True)
    (packages,) = place.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # its .pth files are not read
    return place


def run_in(folder: Path, *arguments: object) -> str:
    """Run a command outside of the checkout, and return what it printed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(list(map(str, arguments)), cwd=folder, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    assert places <= {".ci", ".github", "benchmarks", "docs", "examples", "geomcache", "packages", "pipelines", "tests"}
    assert not [name for name in names if name.endswith((".safetensors", ".pyc", ".log"))]


@pytest.mark.slow
def test_the_wheel_runs_outside_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Run in a new environment, which finds the dependencies in this one's packages, and not the checkout."""
    place = install(tmp_path / "venv", wheel)
    cache = make_store(tmp_path / "cache.zarr")

    def run(*arguments: object) -> str:
        return run_in(tmp_path, *arguments)

    found = run(place / "bin" / "python", "-c", "import geomcache; print(geomcache.__file__)")
    assert Path(found.strip()).is_relative_to(place)
    assert "extract" in run(place / "bin" / "geomcache", "--help")
    assert "geomcache 0." in run(place / "bin" / "geomcache", "--version")
    assert "90 present" in run(place / "bin" / "geomcache", "info", cache)
    assert "every file, frame and row as it was written" in run(place / "bin" / "geomcache", "verify", cache)


# What LeRobot's commands do first, and what that imports.
DISCOVERY = """
import sys
from lerobot.scripts import lerobot_{command}
before = {{name.partition(".")[0] for name in sys.modules}}
from lerobot.utils.import_utils import register_third_party_plugins
register_third_party_plugins()
from lerobot.configs import PreTrainedConfig
assert {{"pi05_geometry", "pi0_geometry", "smolvla_geometry"}} <= set(PreTrainedConfig.get_known_choices())
import {plugin}
print({plugin}.__file__)
print(sorted({{name.partition(".")[0] for name in sys.modules}} - before))
"""


@pytest.mark.slow
def test_the_installed_pair_is_found_by_lerobots_commands(wheel: Path, tmp_path: Path) -> None:
    plugin = build("build_wheel", tmp_path / "wheel", ROOT / "packages" / PLUGIN, PLUGIN)
    python = install(tmp_path / "venv", wheel, plugin) / "bin" / "python"
    for command in ("train", "eval", "rollout", "record"):
        found = run_in(tmp_path, python, "-c", DISCOVERY.format(command=command, plugin=PLUGIN)).splitlines()
        assert Path(found[0]).is_relative_to(tmp_path / "venv")
        imported = set(ast.literal_eval(found[-1]))
        assert {"geomcache", PLUGIN} <= imported
        # What another policy's run waits for: nothing heavy that LeRobot has not imported itself.
        assert not imported & {"torch", "transformers", "zarr", "tensorstore", "depth_anything_3", "matplotlib"}
    for policy in ("pi05", "pi0", "smolvla"):
        asked = ["-m", "lerobot.scripts.lerobot_train", f"--policy.type={policy}_geometry", "--help"]
        assert "geom_target_hw" in run_in(tmp_path, python, *asked)
    with zipfile.ZipFile(plugin) as archive:
        metadata = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    assert f"Name: {PLUGIN}\n" in metadata  # LeRobot imports the module of this very name
    assert f"Requires-Dist: geomcache=={version('geomcache')}" in metadata
