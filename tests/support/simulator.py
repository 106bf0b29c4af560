"""Set LIBERO up with its assets once a session, without a question and without a download."""

import ctypes.util
import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from geomcache.simulator import libero

ASSETS = libero.packaged_assets()  # of the extra libero-assets


def _missing() -> str:
    if importlib.util.find_spec("libero") is None:
        return "LIBERO is not installed"
    if ASSETS is None:
        return "the extra libero-assets is not installed"
    if ctypes.util.find_library("OSMesa") is None:
        return "libosmesa6 is not installed"
    return ""


needs_simulator = pytest.mark.skipif(bool(_missing()), reason=_missing())
needs_libero = pytest.mark.skipif(importlib.util.find_spec("libero") is None, reason="LIBERO is not installed")
needs_plus = pytest.mark.skipif(
    importlib.util.find_spec("liberoplus") is None, reason="the extra libero-plus is not installed"
)


@pytest.fixture(scope="session")
def libero_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """LIBERO's configuration in a folder of this session, and LIBERO imported with it: it remembers the place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIBERO_CONFIG_PATH", str(tmp_path_factory.mktemp("libero")))
        file = libero.write_config(libero.find_package())
        importlib.import_module("libero.libero")
        yield file


@pytest.fixture(scope="session")
def simulator(libero_config: Path) -> Iterator[None]:
    """LIBERO ready to render in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUJOCO_GL", "osmesa")
        patch.setenv("LIBERO_ASSETS", str(ASSETS))
        libero.provide_assets(libero.find_package())
        libero.choose_renderer()
        assert os.environ["MUJOCO_GL"] == "osmesa"
        with warnings.catch_warnings():  # robosuite, gym and mujoco warn of their own code when they are imported
            warnings.simplefilter("ignore")
            importlib.import_module("lerobot.envs.libero")
        yield
