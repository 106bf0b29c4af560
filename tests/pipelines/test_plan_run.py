"""Check the plan of a run: bytes against a cache's files, and the tables in the document against the script."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import plan_run
from tests.support.datasets import ROOT
from tests.support.stores import LENGTHS, make_spec, make_store

SCRIPT = ROOT / "pipelines" / "plan_run.py"


@pytest.mark.parametrize(("grid_hw", "outputs"), [((3, 4), ("ray", "ray_conf")), ((2, 2), ("ray", "depth"))])
def test_bytes_are_those_of_a_caches_files(tmp_path: Path, grid_hw: tuple[int, int], outputs: tuple[str, ...]) -> None:
    path = make_store(tmp_path / "cache.zarr", spec=make_spec(grid_hw=grid_hw, outputs=outputs))
    files = [
        file
        for file in path.rglob("c.*")
        if file.parent.name in (*outputs, "frame_crc32c", "picture_hash", "picture_means")
    ]
    assert plan_run.cache_nbytes(sum(LENGTHS), 2, grid_hw, outputs) == sum(file.stat().st_size for file in files)


def test_hours_are_views_over_the_rate_or_bytes_over_the_drivers() -> None:
    assert plan_run.gpu_hours(3600, 2, 10.0) == 0.2
    run = plan_run.Run(name="x", frames=36_000, views=2, grids=((14, 14),))
    (_, _, line) = plan_run.table([run], ["ray"], plan_run.Rates(views_per_s=10.0, gpus=4, driver_mb_per_s=0.01))
    cells = line.split(" | ")
    assert cells[:4] == ["| x", "36,000", "2", "14x14"]
    assert cells[5:7] == ["2.0", "0.5"]
    nbytes = plan_run.cache_nbytes(36_000, 2, (14, 14), ["ray"])
    assert cells[7] == f"{nbytes / 0.01e6 / 3600:,.1f}"


def test_requests_are_those_of_a_caches_objects(tmp_path: Path) -> None:
    path = make_store(tmp_path / "cache.zarr", spec=make_spec(grid_hw=(3, 4)))
    shards = len(list(path.glob("frame_crc32c/c.*")))
    files = len([*path.rglob("c.*")]) - len([*path.glob("episode*/**/c.*"), *path.glob("frame_index/c.*")])
    assert plan_run.count_requests(sum(LENGTHS), 2, (3, 4)) == (files + shards, files + shards)
    writes, reads = plan_run.count_requests(161_500_000, 2, (36, 36))
    assert writes * plan_run.PART_NBYTES > plan_run.cache_nbytes(161_500_000, 2, (36, 36))  # parts, and small objects
    assert reads * plan_run.BLOCK_NBYTES > plan_run.cache_nbytes(161_500_000, 2, (36, 36))


def test_the_documents_tables_are_the_scripts() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout in (ROOT / "pipelines" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--frames", "9"], "--frames and --views: expected both or none"),
        (["--grid", "14x14"], "--grid: expected --frames and --views"),
        (["--rate", "0"], "--rate: expected more than 0"),
        (["--put-price", "-1"], "--put-price: expected 0 or more"),
        (["--frames", "0", "--views", "1"], "expected at least 1, got 0"),
        (["--outputs", "rays"], "outputs: expected 'ray'"),
    ],
)
def test_a_mistake_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan_run.py", *arguments])
    with pytest.raises(SystemExit) as left:
        plan_run.main()
    assert left.value.code == 2
    assert part in capsys.readouterr().err
