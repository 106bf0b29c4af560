"""The pictures of a dataset next to those that a cache was made of, wherever a command reads both."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geomcache.cache.store import GeometryStore
from geomcache.errors import CacheMismatchError
from geomcache.extraction.parity import parity
from geomcache.frames.of_cache import check_cached_pictures, check_dataset, open_pictures
from geomcache.frames.signature import sign_pictures
from geomcache.frames.source import open_dataset
from geomcache.look.options import ReportOptions, ViewOptions
from geomcache.look.report import report
from geomcache.look.view import view
from tests.support.cli import call
from tests.support.datasets import make_dataset
from tests.support.scene import KEYS, LENGTHS, SIZE, Scene, make_scene
from tests.support.stores import claim_rows, make_maps, make_spec, open_writer


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"))


def with_pictures(scene: Scene, root: Path, order: list[int]) -> Path:
    """A copy of the dataset in which row i has the pictures of row order[i]; its metadata say nothing of it."""
    shutil.copytree(scene.root, root)
    (file,) = (root / "data").rglob("*.parquet")
    table = pq.read_table(file)
    for key in KEYS:
        number = table.column_names.index(key)
        table = table.set_column(number, table.schema.field(number), table.column(key).take(pa.array(order)))
    pq.write_table(table, file)
    return root


@pytest.fixture(scope="module")
def swapped(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second episode has the pictures of the first one's first frames."""
    return with_pictures(scene, tmp_path_factory.mktemp("swapped") / "data", [*range(7), *range(5)])


@pytest.fixture(scope="module")
def foreign(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other pictures, as of another recording, with this dataset's metadata."""
    folder = tmp_path_factory.mktemp("foreign")
    make_dataset(folder / "other", LENGTHS, dict.fromkeys(KEYS, (SIZE, SIZE)), seed=99)
    shutil.copytree(scene.root, folder / "data")
    shutil.rmtree(folder / "data" / "data")
    shutil.copytree(folder / "other" / "data", folder / "data" / "data")
    return folder / "data"


def test_a_dataset_is_compared_and_the_frames_are_counted(scene: Scene) -> None:
    line = check_dataset(scene.cache, dataset=None, root=scene.root, revision=None)
    assert f"{scene.root}: 2 episodes" in line
    frames = int(line.partition("pictures of ")[2].split()[0])
    assert len(LENGTHS) <= frames <= 8


def test_what_differs_is_named(scene: Scene, swapped: Path, foreign: Path) -> None:
    for root, kinds in ((swapped, ("order: episodes 1 ",)), (foreign, ("content: episodes 0:2",))):
        with pytest.raises(CacheMismatchError) as caught:
            check_dataset(scene.cache, dataset=None, root=root, revision=None)
        for part in (str(scene.cache), *kinds):
            assert part in str(caught.value)


def test_view_report_and_parity_compare_pictures(scene: Scene, swapped: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheMismatchError, match="order: episodes 1"):
        view(ViewOptions(path=scene.cache, episode=1, output=tmp_path / "a.png", root=swapped))
    view(ViewOptions(path=scene.cache, episode=0, output=tmp_path / "a.png", root=swapped))  # which fits
    with pytest.raises(CacheMismatchError, match="order: episodes 1"):
        report(ReportOptions(path=scene.cache, output=tmp_path / "a.html", root=swapped))
    with pytest.raises(CacheMismatchError, match="order: episodes 1"):
        parity(scene.cache, 12, root=swapped)
    assert not (tmp_path / "a.html").exists()


def test_an_unfinished_cache_is_not_continued_with_other_pictures(
    scene: Scene, swapped: Path, foreign: Path, tmp_path: Path
) -> None:
    store = GeometryStore.open_by_journal(make_scene(tmp_path, wanted=[(0, 7)], like=scene).cache)
    for root, fits in ((scene.root, True), (swapped, True), (foreign, False)):
        dataset, episodes = open_dataset("geomcache/test", root=root)
        if fits:  # the cache has the first episode alone
            check_cached_pictures(store, dataset, episodes)
        else:
            with pytest.raises(CacheMismatchError, match="content: episodes 0"):
                check_cached_pictures(store, dataset, episodes)
            check_cached_pictures(store, dataset, [(1, 2)])


def test_verify_compares_a_dataset_that_is_named(
    scene: Scene, swapped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "verify", scene.cache) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert call(monkeypatch, "verify", scene.cache, "--root", scene.root) == 0
    assert "sampled frames" in capsys.readouterr().out.splitlines()[1]
    assert call(monkeypatch, "verify", scene.cache, "--root", scene.root, "--json") == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    assert call(monkeypatch, "verify", scene.cache, "--root", swapped) == 2
    assert "order: episodes 1" in capsys.readouterr().err


def test_inexact_time_stamps_are_no_hindrance_where_signatures_decide(tmp_path: Path) -> None:
    """0.4 ms off, which `extract --tolerance-s` and `train --tolerance_s` allow."""
    root = tmp_path / "data"
    make_dataset(root, LENGTHS, dict.fromkeys(KEYS, (SIZE, SIZE)), video=True)
    (file,) = (root / "meta" / "episodes").rglob("*.parquet")
    table = pq.read_table(file)
    for key in KEYS:
        name = f"videos/{key}/from_timestamp"
        number = table.column_names.index(name)
        table = table.set_column(number, name, pa.array(table.column(name).to_numpy() + 4e-4))
    pq.write_table(table, file)
    dataset, _ = open_dataset("geomcache/test", root=root, tolerance_s=0.01)
    signatures = sign_pictures(dataset.reader.read(0, sum(LENGTHS)).images)
    spec = make_spec(cameras=KEYS)
    spec = type(spec).from_dict({**spec.to_dict(), "cameras": [vars(camera) for camera in dataset.cameras]})
    identities = dataset.identities
    with open_writer(
        tmp_path / "cache", spec=spec, lengths=LENGTHS, dataset=dataset.spec, identities=identities
    ) as writer:
        while (claim := writer.claim()) is not None:
            rows = claim_rows(claim)
            writer.commit(claim, make_maps(spec, rows), signatures[rows])
        assert writer.seal()
    with GeometryStore.open(tmp_path / "cache") as store:
        reader = open_pictures(store, np.array([0, 1]), dataset=None, root=root, revision=None)
        assert sign_pictures(reader.read(0, 12).images).equal(signatures).all()
