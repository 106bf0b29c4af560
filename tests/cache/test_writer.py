"""Shards committed one by one, by many processes, through kills and full disks: nothing acknowledged is lost."""

import contextlib
import errno
import json
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from geomcache.cache.journal import Drop
from geomcache.cache.store import GeometryStore
from geomcache.cache.writer import Claim
from geomcache.errors import (
    CacheCorruptError,
    CacheLockedError,
    GeometryError,
    NonFiniteGeometryError,
    OutOfSpaceError,
    UserInputError,
)
from geomcache.ranges import Ranges
from geomcache.statistics import Moments
from tests.support.stores import (
    Faults,
    Killed,
    claim_rows,
    commit,
    expected,
    fill,
    make_maps,
    make_spec,
    make_store,
    open_writer,
    output_of,
    run_python,
)

SPEC = make_spec()
SHORT = (20, 12)  # two shards of 16


def check(path: Path, rows: Ranges, *, sealed: bool = True) -> None:
    """The cache holds these rows, and their values."""
    store = GeometryStore.open(path)
    assert (store.rows, store.sealed) == (rows, sealed)
    numbers = [row for start, stop in rows for row in range(start, stop)]
    wanted, found = expected(store.spec, numbers), store.batch(numbers)
    for name, values in found.items():
        assert np.array_equal(values, wanted[name])
    assert not [str(file) for file in path.rglob("*.tmp")]


def test_shards_are_handed_out_in_order_and_held_once(tmp_path: Path) -> None:
    with open_writer(tmp_path / "cache", [(0, 20), (50, 60)]) as one, open_writer(tmp_path / "cache") as two:
        first, second = one.claim(), two.claim()
        assert first == Claim(0, ((0, 16),))
        assert second == Claim(1, ((16, 32),))
        assert one.claim() == Claim(3, ((50, 60),))  # of shard 1 it wants 4 rows, and another has it
        assert one.claim() is None
        assert one.pending() == (0, 1, 3)
        two.release(second)
        assert one.claim() == Claim(1, ((16, 20),))
        one.release(first)
        assert two.claim() == Claim(0, ((0, 16),))


def test_frames_done_counts_wanted_rows_whoever_made_them(tmp_path: Path) -> None:
    with open_writer(tmp_path / "cache", [(0, 20)]) as one, open_writer(tmp_path / "cache") as two:
        assert (one.frames_done(), two.frames_done()) == (0, 0)
        assert fill(two, 3) == [0, 1, 2]
        assert (one.frames_done(), two.frames_done()) == (20, 48)
        assert (one.pending(), two.pending()) == ((), (3, 4, 5))


def test_commit_returns_the_bytes_on_disk(tmp_path: Path) -> None:
    with open_writer(tmp_path / "cache") as writer:
        claim = writer.claim()
        assert claim is not None
        nbytes = commit(writer, claim, make_maps(SPEC, claim_rows(claim)))
    files = [*(tmp_path / "cache").rglob("c.0.0*")]
    assert nbytes == sum(file.stat().st_size for file in files)
    assert len(files) == 7


def test_resume_goes_on_where_the_last_run_stopped(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    with open_writer(path) as writer:
        assert fill(writer, 2) == [0, 1]
        assert not writer.seal()
    check(path, ((0, 32),), sealed=False)
    with open_writer(path) as writer:
        assert (writer.pending(), writer.frames_done()) == ((2, 3, 4, 5), 32)
        assert fill(writer) == [2, 3, 4, 5]
        assert writer.seal()
        assert writer.seal()
    check(path, ((0, 90),))
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with open_writer(path) as writer:
        assert (writer.claim(), writer.pending(), writer.frames_done(), writer.seal()) == (None, (), 90, True)
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_growth_makes_only_the_shards_again_that_lack_rows(tmp_path: Path) -> None:
    path = make_store(tmp_path / "cache", [(0, 20)])
    untouched = {file: file.stat().st_mtime_ns for file in path.rglob("c.0.0*")}
    with open_writer(path, [(20, 50)]) as writer:
        assert (writer.pending(), writer.frames_done()) == ((1, 2, 3), 0)
        assert (path / "manifest.json").exists()  # nothing has changed yet
        claim = writer.claim()
        assert claim == Claim(1, ((16, 32),))  # with the rows that it had
        commit(writer, claim, make_maps(SPEC, claim_rows(claim)))
        assert not (path / "manifest.json").exists()
        assert "statistics" not in json.loads((path / "zarr.json").read_bytes())["attributes"]["geomcache"]
        assert fill(writer) == [2, 3]
        assert writer.seal()
    check(path, ((0, 50),))
    assert untouched == {file: file.stat().st_mtime_ns for file in path.rglob("c.0.0*")}
    whole = make_store(tmp_path / "whole", [(0, 50)])
    assert (path / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()


def test_rows_between_others_are_packed_and_found(tmp_path: Path) -> None:
    check(make_store(tmp_path / "cache", [(1, 3), (5, 6), (14, 18), (89, 90)]), ((1, 3), (5, 6), (14, 18), (89, 90)))


def test_a_dropped_shard_is_made_again_by_whoever_writes_next(tmp_path: Path) -> None:
    path = make_store(tmp_path / "cache")
    with open_writer(path) as writer:
        claim = Claim(2, ((32, 48),))
        with writer._current():
            writer._append(Drop(2, "damaged"))
    check(path, ((0, 32), (48, 90)), sealed=False)
    with open_writer(path, [(0, 5)]) as writer:
        assert (writer.wanted, writer.removed_stale_files) == (((0, 5), (32, 48)), 0)
        assert (writer.pending(), writer.frames_done()) == ((2,), 5)
        assert writer.claim() == claim
        commit(writer, claim, make_maps(SPEC, claim_rows(claim)))
        assert writer.seal()
    check(path, ((0, 90),))


def test_files_of_a_dropped_shard_are_kept_until_it_is_made_again(tmp_path: Path) -> None:
    path = make_store(tmp_path / "cache")
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("c.2.0*"))
    before = {name: (path / name).read_bytes() for name in names}
    assert len(names) == 7
    with open_writer(path) as writer:
        assert writer.drop(2, writer._journal.commits[2].files, "damaged")
    for _ in range(2):  # whoever opens it, and however often
        with open_writer(path, [(0, 1)]) as writer:
            assert (writer.removed_stale_files, writer.pending()) == (0, (2,))
        assert not [name for name in names if (path / name).exists()]
        assert {name: (path / f"{name}.dropped").read_bytes() for name in names} == before
    # A kill after the new files had their names, and before the journal had its line: the old ones still stay.
    (path / names[0]).write_bytes(b"made again")
    with open_writer(path, [(0, 1)]) as writer:
        assert writer.removed_stale_files == 1
        assert (path / f"{names[0]}.dropped").read_bytes() == before[names[0]]
        fill(writer)
        assert writer.seal()
    assert not [*path.rglob("*.dropped")]
    check(path, ((0, 90),))


def test_a_kill_at_any_moment_of_dropping_loses_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = make_store(tmp_path / "original")
    before = {file.relative_to(original): file.read_bytes() for file in original.rglob("c.2.0*")}
    faults = Faults(monkeypatch)
    operations = 0
    while True:
        path = shutil.copytree(original, tmp_path / "cache")
        with pytest.raises(Killed) if operations else contextlib.nullcontext(), open_writer(path) as writer:
            faults.start(operations - 1 if operations else None)
            assert writer.drop(2, writer._journal.commits[2].files, "damaged")
            total = faults.count
        faults.start()
        with open_writer(path, [(0, 1)]) as writer:
            if writer.pending():  # it was dropped
                assert {name: path.joinpath(f"{name}.dropped").read_bytes() for name in before} == before
            else:
                assert {name: (path / name).read_bytes() for name in before} == before
        shutil.rmtree(path)
        operations += 1
        if operations > total:
            break
    assert total > 10  # the seal, the journal's line, five files


def test_statistics_are_those_of_all_values_whoever_wrote_them_and_when(tmp_path: Path) -> None:
    path = make_store(tmp_path / "in-order")
    with open_writer(tmp_path / "any-order") as one, open_writer(tmp_path / "any-order") as two:
        claims = [one.claim(), two.claim(), one.claim(), two.claim(), two.claim(), one.claim()]
        for number in (3, 0, 5, 4, 1, 2):
            claim = claims[number]
            assert claim is not None
            writer = one if number in (0, 2, 5) else two
            commit(writer, claim, make_maps(SPEC, claim_rows(claim)))
        unsealed = GeometryStore.open(tmp_path / "any-order").camera_statistics
        assert two.seal()
    stores = [GeometryStore.open(each) for each in (path, tmp_path / "any-order")]
    assert stores[0].camera_statistics == stores[1].camera_statistics == unsealed
    assert (path / "manifest.json").read_bytes() == (tmp_path / "any-order" / "manifest.json").read_bytes()
    values = expected(SPEC, range(90))
    for name, moments in stores[0].statistics.items():
        flat = values[name].astype(np.float64).reshape(-1, 6 if name == "ray" else 1)
        seen = flat if name == "ray" else np.log(flat)
        assert moments.count == len(seen)
        assert moments.mean == pytest.approx(seen.mean(axis=0), rel=1e-9)
        assert moments.std == pytest.approx(seen.std(axis=0), rel=1e-9)
    written = json.loads((path / "zarr.json").read_bytes())["attributes"]["geomcache"]["statistics"]["pooled"]
    assert {name: Moments.from_dict(value, name) for name, value in written.items()} == stores[0].statistics


def test_statistics_are_taken_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_store(tmp_path / "whole")
    monkeypatch.setattr("geomcache.cache.writer._STATISTICS_VALUES", 3 * 72)  # three maps of rays
    parts = make_store(tmp_path / "parts")
    of_whole, of_parts = (GeometryStore.open(path).statistics["ray"] for path in (whole, parts))
    assert of_parts.count == of_whole.count
    assert of_parts.mean == pytest.approx(of_whole.mean, rel=1e-12)
    assert of_parts.std == pytest.approx(of_whole.std, rel=1e-12)


def test_saturated_values_are_counted(tmp_path: Path) -> None:
    with open_writer(tmp_path / "cache", [(0, 2)]) as writer:
        claim = writer.claim()
        assert claim is not None
        maps = make_maps(SPEC, [0, 1])
        maps[SPEC.camera_keys[1]]["ray_conf"][1, 0, :3] = 65504
        commit(writer, claim, maps)
        writer.seal()
    assert GeometryStore.open(tmp_path / "cache").statistics["ray_conf"].saturated == 3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_refused_by_place(tmp_path: Path, value: float) -> None:
    with open_writer(tmp_path / "cache", [(18, 40)]) as writer:
        claim = writer.claim()
        assert claim == Claim(1, ((18, 32),))
        maps = make_maps(SPEC, claim_rows(claim))
        maps[SPEC.camera_keys[1]]["ray"][3, 0, 0, 5] = value  # row 21, the second of episode 1
        maps[SPEC.camera_keys[1]]["ray"][7, 1, 1, 1] = value
        with pytest.raises(
            NonFiniteGeometryError, match=f"episode 1 frame 1 camera {SPEC.camera_keys[1]} ray"
        ) as caught:
            commit(writer, claim, maps)
        assert caught.value.places == ((3, 1, "ray"), (7, 1, "ray"))
        maps = make_maps(SPEC, claim_rows(claim))
        maps[SPEC.camera_keys[0]]["ray_conf"][0, 0, 0] = 0  # its logarithm is none
        with pytest.raises(NonFiniteGeometryError, match="episode 0 frame 18 .* above 0"):
            commit(writer, claim, maps)
        assert writer.frames_done() == 0


def test_maps_of_another_form_are_refused(tmp_path: Path) -> None:
    with open_writer(tmp_path / "cache") as writer:
        claim = writer.claim()
        assert claim is not None
        maps = make_maps(SPEC, claim_rows(claim))
        first, second = SPEC.camera_keys
        for wrong, message in (
            ({first: maps[first]}, f"maps: expected {first}/ray, .*, got {first}/ray, {first}/ray_conf"),
            (maps | {"other": maps[first]}, "maps: expected"),
            (maps | {second: {**maps[second], "ray": maps[second]["ray"].astype(np.float32)}}, "got float32"),
            (maps | {second: {**maps[second], "ray": maps[second]["ray"][:15]}}, r"got float16 \[15, 3, 4, 6\]"),
            (maps | {second: {**maps[second], "ray": maps[second]["ray"][..., :5]}}, "expected float16"),
        ):
            with pytest.raises(GeometryError, match=message):
                commit(writer, claim, wrong)
        commit(writer, claim, maps)
        with pytest.raises(CacheLockedError, match="shard 0\\b"):
            commit(writer, claim, maps)


@pytest.mark.parametrize("wanted", [[], [(5, 5)], [(-1, 3)], [(0, 91)]])
def test_rows_that_the_dataset_has_not_are_refused(tmp_path: Path, wanted: list[tuple[int, int]]) -> None:
    with pytest.raises(UserInputError, match="rows: .*0 to 89"):
        open_writer(tmp_path / "cache", wanted)
    assert not (tmp_path / "cache").exists()


def test_stale_files_of_a_killed_run_are_removed_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    with open_writer(path) as writer:
        fill(writer, 2)
    column = path / SPEC.camera_keys[0] / "ray"
    for name in ("c.1.0.0.0.tmp", "c.3.0.0.0", "c.3.0.0.0.tmp", "c.4.0.0.0"):
        (column / name).write_bytes(b"half")
    (path / "frame_crc32c" / "c.4.0").write_bytes(b"half")
    (path / "manifest.json.tmp").write_bytes(b"half")
    (column / "c.notes").write_bytes(b"not ours")
    with (path / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"record":"commit"')
    nbytes = (path / "journal.jsonl").stat().st_size
    with open_writer(path) as holder:
        assert holder.removed_stale_files == 6
        assert (path / "journal.jsonl").stat().st_size == nbytes - 18
        assert fill(holder, 1) == [2]
        claim = holder.claim()
        assert claim is not None
        (column / "c.3.0.0.0.tmp").write_bytes(b"somebody works on it")
        with open_writer(path) as other:
            assert other.removed_stale_files == 0
        (column / "c.3.0.0.0.tmp").unlink()
        holder.release(claim)
    assert (column / "c.notes").read_bytes() == b"not ours"
    check(path, ((0, 48),), sealed=False)


@pytest.mark.parametrize(
    "name",
    [
        "c." + "9" * 200 + ".0.0.0",  # no shard that a lock could be taken of
        "c." + "9" * 200 + ".0.0.0.tmp",
        "c.6.0.0.0",  # of no shard of this cache
        "c.03.0.0.0.tmp",
        "c.\u0663.0.0.0.tmp",  # a digit, but none that we write
        "c.3.0.0.0.tmp~",
    ],
)
def test_files_of_no_shard_are_left_alone(tmp_path: Path, name: str) -> None:
    open_writer(tmp_path / "cache").close()
    file = tmp_path / "cache" / SPEC.camera_keys[0] / "ray" / name
    file.write_bytes(b"not ours")
    with open_writer(tmp_path / "cache") as writer:
        assert writer.removed_stale_files == 0
    assert file.read_bytes() == b"not ours"


def test_a_planted_link_in_place_of_a_temporary_file_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    (tmp_path / "elsewhere").write_bytes(b"two years")
    with open_writer(path) as writer:
        for name in ("zarr.json.tmp", "manifest.json.tmp", f"{SPEC.camera_keys[0]}/ray/c.0.0.0.0.tmp"):
            (path / name).symlink_to(tmp_path / "elsewhere")
        fill(writer)
        assert writer.seal()
    assert (tmp_path / "elsewhere").read_bytes() == b"two years"
    check(path, ((0, 90),))


def test_a_damaged_manifest_is_made_again(tmp_path: Path) -> None:
    path = make_store(tmp_path / "cache")
    content = (path / "manifest.json").read_bytes()
    for damaged in (b"", content[:-1], content.replace(b"ray", b"rax")):
        (path / "manifest.json").write_bytes(damaged)
        with pytest.raises(CacheCorruptError, match=f"{path}/manifest.json: .*sha256"):
            GeometryStore.open(path)
        with open_writer(path) as writer:
            assert writer.claim() is None
            assert writer.seal()
        assert (path / "manifest.json").read_bytes() == content
    check(path, ((0, 90),))


def test_a_missing_or_changed_metadata_file_stops_the_writer(tmp_path: Path) -> None:
    path = make_store(tmp_path / "cache")
    metadata = path / SPEC.camera_keys[0] / "ray" / "zarr.json"
    metadata.write_bytes(metadata.read_bytes().replace(b"float16", b"float32"))
    with pytest.raises(CacheCorruptError, match=r"ray/zarr.json: expected .*, found"):
        open_writer(path)
    metadata.unlink()
    with pytest.raises(CacheCorruptError, match=r"ray/zarr\.json: .*none"):
        open_writer(path)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two shards, none there."""
    path = tmp_path_factory.mktemp("empty") / "cache"
    open_writer(path, lengths=SHORT).close()
    return path


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed cache of two shards that has half of each."""
    return make_store(tmp_path_factory.mktemp("begun") / "cache", [(8, 24)], lengths=SHORT)


def acknowledged(path: Path, into: list[tuple[int, int]]) -> None:
    """Write and seal; what was acknowledged before an interruption is in `into`."""
    writer = open_writer(path, lengths=SHORT)
    try:
        while (claim := writer.claim()) is not None:
            commit(writer, claim, make_maps(SPEC, claim_rows(claim)))
            into.extend(claim.rows)
        assert writer.seal()
    finally:
        writer.close()


@pytest.mark.parametrize("start", ["empty", "begun"])
def test_a_kill_at_any_file_operation_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, start: str
) -> None:
    faults, at, original = Faults(monkeypatch), 0, request.getfixturevalue(start)
    while True:
        path = shutil.copytree(original, tmp_path / str(at))
        faults.start(at)
        done: list[tuple[int, int]] = []
        try:
            acknowledged(path, done)
        except Killed:
            pass
        else:
            break
        faults.start()
        store = GeometryStore.open(path)
        held = {row for first, stop in store.rows for row in range(first, stop)}
        assert {row for first, stop in done for row in range(first, stop)} <= held
        if start == "begun" and len(held) < 16:  # the shard that was being replaced, and no other
            assert held in ({*range(16, 24)}, {*range(8, 16)}, {*range(16)})
        if held:
            values, wanted = store.batch(sorted(held)), expected(SPEC, sorted(held))
            assert all(np.array_equal(array, wanted[name]) for name, array in values.items())
        acknowledged(path, [])
        check(path, ((0, 32),))
        shutil.rmtree(path)
        at += 1
    assert at == faults.count > 60


@pytest.mark.parametrize(("code", "first"), [(errno.ENOSPC, 0), (errno.EIO, 1)])
def test_a_failing_file_operation_is_told_and_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: Path, code: int, first: int
) -> None:
    faults, at = Faults(monkeypatch), first
    while True:
        path = shutil.copytree(begun, tmp_path / str(at))
        faults.start()
        with open_writer(path, lengths=SHORT) as writer:
            faults.start(at, OSError(code, os.strerror(code)))
            try:
                fill(writer)
                assert writer.seal()
            except OSError as error:
                assert isinstance(error, OutOfSpaceError) == (code == errno.ENOSPC)
                assert str(path) in str(error)
            else:
                break
            store = GeometryStore.open(path)
            held = [row for start, stop in store.rows for row in range(start, stop)]
            assert all(np.array_equal(array, expected(SPEC, held)[name]) for name, array in store.batch(held).items())
            for shard in (0, 1):
                if writer._lock.holds(shard):
                    writer.release(Claim(shard, ()))
            fill(writer)
            assert writer.seal()
        check(path, ((0, 32),))
        shutil.rmtree(path)
        at += 2
    assert at >= faults.count > 60


def test_a_full_disk_leaves_no_half_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty: Path) -> None:
    path = shutil.copytree(empty, tmp_path / "cache")
    faults = Faults(monkeypatch)
    with open_writer(path, lengths=SHORT) as writer:
        before = {*path.rglob("*")}
        claim = writer.claim()
        assert claim is not None
        faults.start(9, OSError(errno.ENOSPC, "No space left on device"))  # in the third file
        with pytest.raises(OutOfSpaceError, match=r"ray.*\.tmp: "):
            commit(writer, claim, make_maps(SPEC, claim_rows(claim)))
        assert {*path.rglob("*")} == before
        commit(writer, claim, make_maps(SPEC, claim_rows(claim)))


def test_short_writes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_store(tmp_path / "whole", lengths=SHORT)
    monkeypatch.setattr("geomcache.cache.durable.write", lambda descriptor, data: os.write(descriptor, data[:97]))
    parts = make_store(tmp_path / "parts", lengths=SHORT)
    for file in whole.rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (parts / file.relative_to(whole)).read_bytes()


def test_an_interrupted_append_of_another_process_is_cut_off_by_the_next(tmp_path: Path, empty: Path) -> None:
    path = shutil.copytree(empty, tmp_path / "cache")
    with open_writer(path, lengths=SHORT) as writer:
        with (path / "journal.jsonl").open("ab") as journal:  # as a rank that died in its append leaves it
            journal.write(b'{"bytes":[1')
        assert fill(writer) == [0, 1]
        assert writer.seal()
    lines = (path / "journal.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["record"] for line in lines] == ["begin", "commit", "commit"]
    check(path, ((0, 32),))


WRITE = """
import sys
from pathlib import Path
from tests.support.stores import claim_rows, commit, make_maps, open_writer
with open_writer(Path(sys.argv[1]), lengths=(200, 120)) as writer:
    print("open", flush=True)
    sys.stdin.readline()
    while (claim := writer.claim()) is not None:
        commit(writer, claim, make_maps(writer.spec, claim_rows(claim)))
        print(claim.shard, flush=True)
    print("sealed", writer.seal(), flush=True)
"""


def test_processes_divide_the_work_and_make_every_shard_once(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    processes = [run_python(WRITE, path) for _ in range(3)]  # all of them try to create it, one does
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [output_of(process).split("\n") for process in processes]
    shards = sorted(int(line) for lines in outputs for line in lines if line.isdigit())
    assert shards == list(range(20))
    assert any("sealed True" in lines for lines in outputs)
    check(path, ((0, 320),))
    assert not [file for file in tmp_path.iterdir() if file != path]  # the losers' folders are gone


def test_sigkill_frees_the_claim_and_costs_the_shard_at_hand_at_most(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    process = run_python(WRITE, path)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    process.stdin.write("\n")
    process.stdin.flush()
    acknowledged_shards = [int(process.stdout.readline()) for _ in range(7)]
    os.kill(process.pid, signal.SIGKILL)
    acknowledged_shards += [int(line) for line in process.communicate()[0].split()]
    assert process.returncode == -signal.SIGKILL
    with open_writer(path, lengths=(200, 120)) as writer:
        journaled = 20 - len(writer.pending())
        assert journaled - len(acknowledged_shards) in (0, 1)  # the last may have died between line and print
        assert set(writer.pending()).isdisjoint(acknowledged_shards)
        assert fill(writer) == list(range(journaled, 20))
        assert writer.seal()
    check(path, ((0, 320),))


def test_threads_of_one_process_share_a_writer(tmp_path: Path) -> None:
    made: list[int] = []
    with open_writer(tmp_path / "cache", lengths=(160, 160)) as writer:
        threads = [threading.Thread(target=lambda: made.extend(fill(writer))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(made) == list(range(20))
        assert writer.seal()
    check(tmp_path / "cache", ((0, 320),))


def test_a_reader_sees_what_is_there_while_it_grows(tmp_path: Path) -> None:
    with open_writer(tmp_path / "cache") as writer:
        early = GeometryStore.open(tmp_path / "cache")
        assert (early.rows, early.episodes(), early.statistics) == ((), (), {})
        fill(writer, 4)
        late = GeometryStore.open(tmp_path / "cache")
        assert (late.rows, late.episodes(), late.missing_episodes()) == (((0, 64),), ((0, 2),), ((2, 4),))
        assert early.rows == ()


def test_close_gives_claims_back_once(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "cache")
    assert writer.claim() is not None
    with open_writer(tmp_path / "cache") as other:
        writer.close()
        writer.close()
        assert other.claim() == Claim(0, ((0, 16),))
        with pytest.raises(ValueError, match="used after it was closed"):
            writer.claim()


def test_readers_and_a_writer_that_seals_and_unseals_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = make_store(tmp_path / "cache", [(0, 5)])
    stop = threading.Event()
    found: list[Ranges] = []
    failures: list[BaseException] = []

    def read() -> None:
        try:
            while not stop.is_set():
                found.append(GeometryStore.open(path).rows)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for end in range(20, 91, 5):
        with open_writer(path, [(0, end)]) as writer:
            fill(writer)
            assert writer.seal()
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(found) > 1
    check(path, ((0, 90),))
