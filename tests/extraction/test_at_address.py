"""Stage one into a bucket at the end of a long and bad line: the objects are the files of a run into a folder."""

from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch

from geomcache.errors import CacheMismatchError, ConnectionFailedError, UserInputError
from geomcache.extraction.at_address import check_processes
from geomcache.extraction.options import ExtractOptions
from geomcache.extraction.run import extract
from geomcache.look.info import describe
from geomcache.look.options import ViewOptions
from geomcache.look.view import view
from geomcache.sharing.remote_check import verify_address
from tests.faults.ray_cluster import NODE
from tests.support.datasets import ROOT, make_dataset
from tests.support.logs import logged_lines
from tests.support.servers import Wire, patient_s3, s3_wire
from tests.support.sharing import contents

__all__ = ["patient_s3", "s3_wire"]

ADDRESS = "s3://bucket/caches/made-up.zarr"
LENGTHS = (20, 17, 23)


@pytest.fixture
def options(random_da3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExtractOptions:
    make_dataset(tmp_path / "dataset", LENGTHS)
    monkeypatch.setenv("GEOMCACHE_HOME", str(tmp_path / "home"))
    return ExtractOptions(
        model=str(random_da3_folder),
        dataset="geomcache/test",
        root=tmp_path / "dataset",
        output=ADDRESS,
        process_res=56,
        batch_size=8,
        num_workers=0,
        device="cpu",
    )


def objects() -> dict[str, bytes]:
    driver = fsspec.filesystem("s3")
    driver.invalidate_cache()
    root = ADDRESS.removeprefix("s3://")
    return {path.removeprefix(f"{root}/"): driver.cat_file(path) for path in driver.find(root)}


@pytest.mark.slow
def test_extraction_over_a_bad_line_gives_the_same_cache(
    options: ExtractOptions, tmp_path: Path, patient_s3: Wire
) -> None:
    """50 ms of latency, and every connection cut after some 60 kB: the first episode, and then the rest."""
    path = extract(replace(options, output=tmp_path / "here.zarr")).path
    patient_s3.latency_s = 0.05
    patient_s3.cut_at_random(60_000, seed=0)
    reports = []
    for episodes in ("0", None):
        for attempt in range(10):
            try:
                reports.append(extract(replace(options, episodes=episodes)))
            except ConnectionFailedError as error:
                assert ADDRESS in str(error)
                assert attempt < 9
            else:
                break
    assert patient_s3.cuts > 0
    patient_s3.mend()
    patient_s3.latency_s = 0.0
    assert all(line.startswith(ADDRESS) for report in reports for line in report.lines()[:1])
    there, here = objects(), contents(path)
    assert there.keys() == here.keys()
    shards = [name for name in here if name != "journal.jsonl"]  # the first episode's second shard was made again
    assert {name: there[name] for name in shards} == {name: here[name] for name in shards}
    assert verify_address(ADDRESS).problems == ()
    facts = describe(ADDRESS)
    assert (facts["path"], facts["sealed"], facts["frames_present"]) == (ADDRESS, True, sum(LENGTHS))
    pictures = [tmp_path / f"{name}.png" for name in ("there", "here")]
    places: list[Path | str] = [ADDRESS, path]
    for place, picture in zip(places, pictures, strict=True):
        view(ViewOptions(path=place, episode=1, frame=3, rgb=False, output=picture))
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    (line,) = extract(options).lines()
    assert line.startswith(f"{ADDRESS}: complete, {sum(LENGTHS)} frames; nothing to do")


@pytest.mark.slow
def test_a_ray_cluster_makes_the_same_cache_there(
    options: ExtractOptions, tmp_path: Path, patient_s3: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Do what the error of several processes advises. The driver alone writes; actors know no bucket."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # numbers of a CPU depend on it; Ray would set an actor's processors
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        path = extract(replace(options, output=tmp_path / "here.zarr")).path
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        try:
            extract(replace(options, cluster="ray", cluster_address=cluster.address, num_workers=1))
        finally:
            cluster.shutdown()
    finally:
        torch.set_num_threads(threads)
    there, here = objects(), contents(path)
    assert there.keys() == here.keys()
    shards = [name for name in here if name != "journal.jsonl"]  # in the order in which they were ready
    assert {name: there[name] for name in shards} == {name: here[name] for name in shards}


def test_a_dry_run_counts_the_requests(options: ExtractOptions) -> None:
    with logged_lines() as lines:
        extract(replace(options, dry_run=True))
    # two cameras' rays and confidences, checksums, two tables of signatures and a line, for 4 shards of 16 rows
    assert any(line.split()[:3] == ["requests", "about", str(4 * 8)] for line in lines)
    assert any(ADDRESS in line for line in lines)


def test_what_needs_a_path_is_refused(options: ExtractOptions, s3_wire: Wire, tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=rf"output: .*--follow.*{ADDRESS}"):
        replace(options, follow=True)
    with pytest.raises(UserInputError, match=rf"{ADDRESS}: .*2"):
        check_processes(options, 2)
    extract(replace(options, episodes="0"))
    make_dataset(tmp_path / "other", LENGTHS, seed=9)
    with pytest.raises(CacheMismatchError, match=ADDRESS):
        extract(replace(options, root=tmp_path / "other"))
