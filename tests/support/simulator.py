"""Set LIBERO up with its assets once a session, without a question and without a download."""

import ctypes.util
import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from geomcache.evaluation import libero

ASSETS = Path(__file__).parents[3] / "shared" / "libero" / "assets"


def _missing() -> str:
    if importlib.util.find_spec("libero") is None:
        return "LIBERO is not installed"
    if not ASSETS.is_dir():
        return "../shared/libero/assets is missing"
    if ctypes.util.find_library("OSMesa") is None:
        return "libosmesa6 is not installed"
    return ""


needs_simulator = pytest.mark.skipif(bool(_missing()), reason=_missing())
needs_libero = pytest.mark.skipif(importlib.util.find_spec("libero") is None, reason="LIBERO is not installed")


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
