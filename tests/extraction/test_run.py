"""Stage one from end to end, read back by stock zarr and tensorstore, against upstream's network on the frames."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from geomcache.cache.codecs import Codec
from geomcache.cache.commands import extract_command, run_config_path
from geomcache.cache.header import LOCK
from geomcache.cache.locks import LockFile
from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import verify
from geomcache.errors import (
    CacheExistsError,
    CacheMismatchError,
    FrameDecodeError,
    NonFiniteGeometryError,
    OutOfSpaceError,
    UserInputError,
)
from geomcache.extraction.options import ExtractOptions, recorded_options
from geomcache.extraction.plan import require_space
from geomcache.extraction.run import ExtractReport, extract
from geomcache.extraction.run_config import read_run_config
from geomcache.frames.source import open_dataset
from geomcache.pipeline import pipeline
from tests.support.da3 import area_average, assert_one_step, upstream_maps, upstream_network
from tests.support.datasets import DEMO, make_dataset
from tests.support.logs import logged_lines

LENGTHS = (20, 17, 23)
FRAMES = sum(LENGTHS)
CAMERAS = ("observation.images.image", "observation.images.image2")


@pytest.fixture(scope="module")
def dataset_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("extract") / "dataset"
    make_dataset(root, LENGTHS)
    return root


@pytest.fixture(scope="module")
def options(random_da3_folder: Path, dataset_root: Path, tmp_path_factory: pytest.TempPathFactory) -> ExtractOptions:
    return ExtractOptions(
        model=str(random_da3_folder),
        dataset="geomcache/test",
        root=dataset_root,
        output=tmp_path_factory.mktemp("reference") / "cache.zarr",
        process_res=56,
        grid="native",
        outputs=("ray", "ray_conf", "depth", "depth_conf"),
        batch_size=8,
        num_workers=0,
        device="cpu",
    )


@pytest.fixture(scope="module")
def reference(options: ExtractOptions) -> ExtractReport:
    """A run in one go, without workers."""
    return extract(options)


def run(options: ExtractOptions, **changes: Any) -> tuple[ExtractReport, list[str]]:
    with logged_lines() as lines:
        return extract(replace(options, **changes)), lines


def assert_same_rows(path: Path, other: Path, frames: int = FRAMES) -> None:
    store, expected = GeometryStore.open(path), GeometryStore.open(other)
    assert store.fingerprint == expected.fingerprint
    assert store.rows == expected.rows == ((0, frames),)
    rows = np.arange(frames)
    for (name, ours), (_, theirs) in zip(store.batch(rows).items(), expected.batch(rows).items(), strict=True):
        assert_one_step(ours, theirs)
        assert np.isfinite(ours).all(), name


def read_by_zarr(path: Path, array: str) -> NDArray[Any]:
    stored = zarr.open_array(path / array, mode="r")[:]
    assert isinstance(stored, np.ndarray)
    return stored


def test_stock_readers_find_what_upstream_computes(options: ExtractOptions, reference: ExtractReport) -> None:
    network = upstream_network(Path(options.model))
    dataset, _ = open_dataset("test", root=options.root)
    for index in (0, 19, 20, 41, 59):
        images = [camera[0] for camera in dataset.reader.read(index, index + 1).images]
        expected = upstream_maps(network, images, options.process_res)
        for name in ("depth", "depth_conf"):  # the main head's maps are finer than the rays' grid
            expected[name] = area_average(expected[name], (32, 32))
        for name in options.outputs:
            for view, camera in enumerate(CAMERAS):
                assert_one_step(read_by_zarr(reference.path, f"{camera}/{name}")[index], expected[name][view])
                array = tensorstore.open(
                    {"driver": "zarr3", "kvstore": f"file://{reference.path}/{camera}/{name}"}, open=True
                ).result()
                assert_one_step(array[index].read().result(), expected[name][view])


def test_the_patch_grid_averages_the_native_one(options: ExtractOptions, tmp_path: Path) -> None:
    run(options, output=tmp_path / "patch.zarr", grid="patch", outputs=("ray", "ray_conf"), episodes="1")
    network = upstream_network(Path(options.model))
    dataset, _ = open_dataset("test", root=options.root)
    store = GeometryStore.open(tmp_path / "patch.zarr")
    assert store.spec.grid_hw == (4, 4)
    assert store.rows == ((20, 37),)
    for frame in (0, 16):
        images = [camera[0] for camera in dataset.reader.read(20 + frame, 21 + frame).images]
        expected = upstream_maps(network, images, options.process_res)
        for name, values in store.frame(1, frame).items():
            assert_one_step(values[0], area_average(expected[name], (4, 4)))


def test_a_compressed_cache_has_the_same_numbers(
    options: ExtractOptions, reference: ExtractReport, tmp_path: Path
) -> None:
    path = tmp_path / "cache.zarr"
    report, _ = run(options, output=path, codec="zstd")
    assert_same_rows(path, reference.path)
    store = GeometryStore.open(path)
    assert (store.codec, store.nbytes) == ("zstd", report.nbytes)
    assert report.nbytes < reference.nbytes
    lacking = extract_command(store, np.array([1]))
    assert "--codec zstd" in lacking
    assert "--codec" not in extract_command(GeometryStore.open(reference.path), np.array([1]))
    with pytest.raises(CacheMismatchError) as caught:
        run(options, output=path)
    assert (caught.value.field, caught.value.cached, caught.value.wanted) == ("codec", "zstd", "raw")
    # What the run recorded next to its cache repeats it.
    recorded = read_run_config(run_config_path(path), recorded_options())
    assert recorded["codec"] == "zstd"


def test_the_report_counts_what_was_done(reference: ExtractReport) -> None:
    assert (reference.frames, reference.views, reference.frames_total) == (FRAMES, 2 * FRAMES, FRAMES)
    store = GeometryStore.open(reference.path)
    assert store.sealed
    assert reference.nbytes == store.nbytes
    assert reference.shards == -(-FRAMES // store.shard_frames)
    assert f"{FRAMES} frames, {2 * FRAMES} views" in reference.lines()[0]


def test_the_rate_leaves_out_the_start_up_and_the_first_batch(reference: ExtractReport) -> None:
    assert reference.steady_views == 2 * (FRAMES - 8)  # batches of 8
    assert reference.views_per_s == reference.steady_views / reference.steady_s
    assert reference.startup_s + reference.steady_s > reference.seconds  # loading the model is before the first claim
    assert f"at {reference.views_per_s:.1f} views/s" in reference.lines()[0]
    single = replace(reference, steady_views=0)
    assert single.views_per_s is None
    assert "one batch" in single.lines()[0]


def test_a_finished_cache_says_so(options: ExtractOptions, reference: ExtractReport) -> None:
    report, _ = run(options)
    assert report.frames == 0
    (line,) = report.lines()
    assert line.startswith(f"{report.path}: complete, {FRAMES} frames; nothing to do")


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_shard_that_lacks_a_file_is_made_again(
    options: ExtractOptions, reference: ExtractReport, tmp_path: Path, damage: str
) -> None:
    path = Path(shutil.copytree(reference.path, tmp_path / "cache.zarr"))
    lost = path / CAMERAS[0] / "ray" / "c.1.0.0.0"
    if damage == "missing":
        lost.unlink()
    else:
        lost.write_bytes(lost.read_bytes()[:100])
    report, lines = run(options, output=path, episodes="0")  # shard 1 has rows of episode 0 and of others
    frames = GeometryStore.open(reference.path).shard_frames
    assert (report.frames, report.shards) == (frames, 1)
    assert [line for line in lines if "shard 1 " in line and f"{CAMERAS[0]}/ray/c.1.0.0.0" in line]
    assert_same_rows(path, reference.path)
    assert verify(path).problems == ()
    assert run(options, output=path)[0].frames == 0


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"batch_size": 7}, {"batch_size": 7, "num_workers": 2}])
def test_rows_do_not_depend_on_batches_or_workers(
    options: ExtractOptions, reference: ExtractReport, tmp_path: Path, changes: dict[str, int]
) -> None:
    run(options, output=tmp_path / "cache.zarr", **changes)
    assert_same_rows(tmp_path / "cache.zarr", reference.path)


def test_rows_do_not_depend_on_what_was_extracted_before(
    options: ExtractOptions, reference: ExtractReport, tmp_path: Path
) -> None:
    """Episode by episode, out of order, into one cache; the shard that two episodes share is made again."""
    path = tmp_path / "cache.zarr"
    first, _ = run(options, output=path, episodes="2")
    assert first.frames == LENGTHS[2]
    assert GeometryStore.open(path).episodes() == ((2, 3),)
    _, lines = run(options, output=path, episodes="0:2")
    assert "resuming" not in " ".join(lines)
    assert GeometryStore.open(path).sealed
    assert_same_rows(path, reference.path)


def command(options: ExtractOptions, output: Path) -> list[str]:
    return [
        "-m", "geomcache", "extract", "--model", options.model, "--dataset", options.dataset,
        "--root", str(options.root), "--output", str(output), "--process-res", str(options.process_res),
        "--grid", options.grid,
        "--outputs", ",".join(options.outputs), "--batch-size", "2", "--num-workers", "0", "--device", "cpu",
    ]  # fmt: skip


def committed(path: Path) -> int:
    try:
        return (path / "journal.jsonl").read_text().count('"record":"commit"')
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_run_that_is_stopped_goes_on_where_it_was(
    options: ExtractOptions, reference: ExtractReport, tmp_path: Path, number: signal.Signals
) -> None:
    path = tmp_path / "cache.zarr"
    process = subprocess.Popen(
        [sys.executable, *command(options, path)], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while committed(path) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert errors.decode().startswith(f"geomcache: stopped by {number.name}: ")
        assert errors.decode().count("\n") == 1
    stopped = GeometryStore.open(path)
    assert not stopped.sealed
    assert 0 < stopped.frames_present < FRAMES
    report, lines = run(options, output=path)
    assert report.frames == FRAMES - stopped.frames_present
    assert f"{path}: {stopped.frames_present} of {FRAMES} frames" in " ".join(lines)
    assert_same_rows(path, reference.path)


def test_two_processes_under_accelerate_share_the_work(
    options: ExtractOptions, reference: ExtractReport, tmp_path: Path
) -> None:
    path = tmp_path / "cache.zarr"
    # Not --cpu: without MPI accelerate would start a single process.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    done = subprocess.run(
        [sys.executable, *launch, "--mixed_precision", "no", "--dynamo_backend", "no", *command(options, path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shares = [line.split(": ")[1] for line in done.stdout.splitlines() if line.startswith(f"{path}: ")]
    assert len(shares) == 2, done.stdout  # each process tells what it did
    assert sum(int(share.split()[0]) for share in shares if not share.startswith("complete")) == FRAMES
    assert_same_rows(path, reference.path)


def test_shards_that_another_process_holds_are_waited_for_with_a_line(
    options: ExtractOptions, reference: ExtractReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache.zarr"
    run(options, output=path, episodes="0")
    monkeypatch.setattr(pipeline, "WAIT_LINE_S", 0.1)
    holder = LockFile(path / LOCK)
    assert holder.claim(3)  # the last shard: rows 48 to 59
    with logged_lines() as lines:

        def waiting() -> list[str]:
            return [line for line in lines if "other processes hold" in line]

        def release() -> None:
            while not waiting():
                time.sleep(0.01)
            holder.release(3)

        thread = threading.Thread(target=release)
        thread.start()
        extract(replace(options, output=path))
        thread.join()
    assert all(line.endswith(": 3") for line in waiting())
    holder.close()
    assert_same_rows(path, reference.path)


def test_views_are_one_scene_and_frames_are_not(
    options: ExtractOptions, reference: ExtractReport, tmp_path: Path
) -> None:
    """Independent views and one camera alone agree; joint views do not agree with them."""
    run(options, output=tmp_path / "independent.zarr", views="independent", episodes="0")
    run(options, output=tmp_path / "alone.zarr", cameras=(CAMERAS[1],), episodes="0")
    independent = GeometryStore.open(tmp_path / "independent.zarr").frame(0, 3)
    alone = GeometryStore.open(tmp_path / "alone.zarr").frame(0, 3)
    joint = GeometryStore.open(reference.path).frame(0, 3)
    assert_one_step(independent.ray[:, 1], alone.ray[:, 0])
    assert np.abs(joint.ray[:, 1].astype(float) - alone.ray[:, 0].astype(float)).max() > 0.01


def test_other_settings_are_refused_by_name(options: ExtractOptions, reference: ExtractReport) -> None:
    with pytest.raises(CacheMismatchError, match=r"spec\.process_res") as caught:
        run(options, process_res=70)
    assert (caught.value.cached, caught.value.wanted) == (56, 70)
    with pytest.raises(CacheMismatchError, match=r"spec\.cameras"):
        run(options, cameras=tuple(reversed(CAMERAS)))
    assert GeometryStore.open(reference.path).sealed


def test_overwriting_replaces_a_cache_and_nothing_else(options: ExtractOptions, tmp_path: Path) -> None:
    path = tmp_path / "cache.zarr"
    run(options, output=path, episodes="1")
    run(options, output=path, episodes="1", process_res=70, overwrite=True)
    assert GeometryStore.open(path).spec.process_res == 70
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(CacheExistsError):
            run(options, output=tmp_path / "mine", overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"


def test_nan_is_named_with_episode_frame_and_camera(options: ExtractOptions, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((Path(options.model) / "config.json").read_bytes())
    weights = load_file(Path(options.model) / "model.safetensors")
    weights["model.head.scratch.output_conv2_aux.3.5.bias"][2] = float("nan")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        NonFiniteGeometryError, match=r"episode 1 frame 0 camera observation\.images\.image ray; .*image2 ray"
    ):
        run(options, model=str(folder), output=tmp_path / "cache.zarr", episodes="1")
    store = GeometryStore.open(tmp_path / "cache.zarr")
    assert not store.sealed
    assert store.frames_present == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_frame_that_cannot_be_decoded_stops_the_run(
    options: ExtractOptions, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(DEMO, tmp_path / "demo"))
    (root / "videos" / CAMERAS[1] / "chunk-000" / "file-000.mp4").write_bytes(b"\0" * 4096)
    with pytest.raises(FrameDecodeError, match=rf"^episode 0 frame 0, camera {CAMERAS[1]}: ") as caught:
        run(options, root=root, output=tmp_path / "cache.zarr", num_workers=workers)
    assert "\n" not in str(caught.value)
    assert not GeometryStore.open(tmp_path / "cache.zarr").sealed


def test_space_is_checked_before_anything_is_made(
    options: ExtractOptions, reference: ExtractReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(OutOfSpaceError, match=r"60 frames, found 1\.0 kB"):
        run(options, output=tmp_path / "deep" / "cache.zarr")
    assert not (tmp_path / "deep").exists()
    with pytest.raises(OutOfSpaceError):
        require_space(tmp_path, GeometryStore.open(reference.path).spec, 60, Codec("raw"))
    require_space(tmp_path, GeometryStore.open(reference.path).spec, 60, Codec("zstd"))  # may be what it is chosen for


def test_a_dry_run_writes_nothing_and_tells_the_bytes(
    options: ExtractOptions, reference: ExtractReport, tmp_path: Path
) -> None:
    _, lines = run(options, output=tmp_path / "cache.zarr", dry_run=True)
    assert not (tmp_path / "cache.zarr").exists()
    text = "\n".join(lines)
    assert f"frames    {FRAMES}" in text
    assert f"views     {2 * FRAMES} ({', '.join(CAMERAS)})" in text
    assert "grid      32x32 (native at 56 px)" in text
    told = float(text.partition("output")[2].partition(": ")[2].split()[0]) * 1e6
    assert told == pytest.approx(reference.nbytes, rel=0.02)
    assert "ms a frame" in text


def test_the_batch_size_that_is_found_changes_no_number(
    options: ExtractOptions, reference: ExtractReport, tmp_path: Path
) -> None:
    report, lines = run(options, output=tmp_path / "cache.zarr", batch_size="auto")
    assert [line for line in lines if re.match(r"batch size \d+: [\d.]+ views/s; ", line)]
    assert report.frames == FRAMES
    whole, found = GeometryStore.open(reference.path), GeometryStore.open(report.path)
    for (_, ours), (_, theirs) in zip(
        found.batch(range(FRAMES)).items(), whole.batch(range(FRAMES)).items(), strict=True
    ):
        assert_one_step(ours, theirs)


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("num_workers", -1)])
def test_options_that_make_no_sense_are_refused(options: ExtractOptions, name: str, value: int) -> None:
    with pytest.raises(UserInputError, match=rf"{name.replace('_', '-')}: .*{value}"):
        replace(options, **{name: value})  # type: ignore[arg-type]


def test_the_cache_is_named_after_the_dataset(options: ExtractOptions) -> None:
    assert replace(options, output=None, dataset="HuggingFaceVLA/libero").output_path == Path("libero.zarr")


def test_cached_statistics_are_those_of_the_stored_numbers(reference: ExtractReport) -> None:
    store = GeometryStore.open(reference.path)
    for name, moments in store.statistics.items():
        values = np.stack([read_by_zarr(reference.path, f"{camera}/{name}") for camera in CAMERAS]).astype(np.float64)
        values = (
            values.reshape(-1, 6)
            if name == "ray"
            else np.log(values.reshape(-1, 1))
            if "conf" in name
            else values.reshape(-1, 1)
        )
        np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-9)
        np.testing.assert_allclose(moments.std, values.std(0), rtol=1e-9)
    attributes = json.loads((reference.path / "zarr.json").read_text())["attributes"]["geomcache"]
    assert attributes["statistics"]["pooled"]["ray"]["mean"] == list(store.statistics["ray"].mean)
