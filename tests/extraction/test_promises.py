"""What messages about a cache tell the user to do, done: the commands are taken from the messages and run."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from geomcache.cache.compatibility import require_episodes
from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import verify
from geomcache.errors import CacheCorruptError, CacheIncompleteError, CacheMismatchError, MissingFrameError
from geomcache.extraction.options import ExtractOptions
from geomcache.extraction.run import extract
from tests.support.cli import call
from tests.support.datasets import make_dataset

LENGTHS = (20, 17)
ROWS = np.arange(sum(LENGTHS))
RAY = "observation.images.image/ray/c.1.0.0.0"


@pytest.fixture(scope="module")
def options(random_da3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ExtractOptions:
    folder = tmp_path_factory.mktemp("promises")
    make_dataset(folder / "dataset", LENGTHS)
    return ExtractOptions(
        model=str(random_da3_folder),
        dataset="geomcache/test",
        root=folder / "dataset",
        output=folder / "cache.zarr",
        process_res=28,
        num_workers=0,
        device="cpu",
    )


@pytest.fixture(scope="module")
def whole(options: ExtractOptions) -> Path:
    extract(options)
    return options.output_path


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "cache.zarr"))


def assert_whole(cache: Path, whole: Path) -> None:
    assert verify(cache).problems == ()
    with GeometryStore.open(cache) as repaired, GeometryStore.open(whole) as expected:
        np.testing.assert_array_equal(repaired.batch(ROWS).ray, expected.batch(ROWS).ray)


def run_printed(monkeypatch: pytest.MonkeyPatch, command: str, *more: object) -> int:
    program, *words = shlex.split(command)
    assert program == "geomcache"
    return call(monkeypatch, *words, *more)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def test_a_damaged_map_is_repaired_as_its_error_says(
    cache: Path,
    whole: Path,
    options: ExtractOptions,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flip(cache / RAY)
    with GeometryStore.open(cache) as store, pytest.raises(CacheCorruptError) as caught:
        store.batch(ROWS)
    (repair,) = re.findall(r"`(geomcache verify [^`]*)`", str(caught.value))
    assert "--overwrite" not in str(caught.value)
    run_printed(monkeypatch, repair)
    (again,) = [line for line in capsys.readouterr().out.splitlines() if "geomcache extract" in line]
    command = again.partition("  (with --root DIR")[0].strip()
    assert run_printed(monkeypatch, command, "--root", options.root, "--device", "cpu", "--num-workers", 0) == 0
    assert_whole(cache, whole)


def test_a_damaged_manifest_is_made_again_by_the_extract_command(
    cache: Path, whole: Path, options: ExtractOptions
) -> None:
    flip(cache / "manifest.json")
    with pytest.raises(CacheCorruptError, match="run the extract command that made the cache again"):
        GeometryStore.open(cache)
    extract(ExtractOptions(**{**vars(options), "output": cache}))
    assert_whole(cache, whole)


def test_a_missing_episode_is_added_by_the_command_of_either_error(
    whole: Path, options: ExtractOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache.zarr"
    extract(ExtractOptions(**{**vars(options), "output": cache, "episodes": "0"}))
    with GeometryStore.open(cache) as store:
        with pytest.raises(MissingFrameError) as missing:
            store.batch([30])
        with pytest.raises(CacheIncompleteError) as incomplete:
            require_episodes(store, None, str(options.root))
    commands = [re.findall(r"`(geomcache extract [^`]*)`", str(each.value))[0] for each in (missing, incomplete)]
    assert commands[1] == commands[0].replace(" --episodes 1", f" --root {options.root} --episodes 1")
    assert run_printed(monkeypatch, commands[1], "--device", "cpu", "--num-workers", 0) == 0
    assert_whole(cache, whole)


def test_other_pictures_end_a_resumed_run_before_anything_is_encoded(
    options: ExtractOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a cache, and then a dataset whose pictures were exchanged under the same metadata."""
    cache, root = tmp_path / "cache.zarr", tmp_path / "dataset"
    extract(ExtractOptions(**{**vars(options), "output": cache, "episodes": "0"}))
    make_dataset(root, LENGTHS, seed=5)
    assert options.root is not None
    shutil.rmtree(root / "meta")
    shutil.copytree(options.root / "meta", root / "meta")
    before = (cache / "journal.jsonl").read_bytes()
    with pytest.raises(CacheMismatchError, match="content: episodes 0"):
        extract(ExtractOptions(**{**vars(options), "output": cache, "root": root}))
    assert (cache / "journal.jsonl").read_bytes() == before
    extract(ExtractOptions(**{**vars(options), "output": tmp_path / "other.zarr", "root": root}))  # what it advises
