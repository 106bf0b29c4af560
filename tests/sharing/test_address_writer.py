"""Caches that are made at an address: compared with one made in a folder, whatever is cut, killed or started twice."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

import geomcache
from geomcache.cache.journal import decode_line
from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import verify
from geomcache.errors import (
    CacheExistsError,
    CacheIncompleteError,
    CacheLockedError,
    CacheMismatchError,
    ConnectionFailedError,
    RemoteError,
    UserInputError,
)
from geomcache.sharing import base, lease
from geomcache.sharing.address_writer import AddressWriter, work_folder
from geomcache.sharing.conditional import ConditionalRemote
from geomcache.sharing.lease import Lease
from geomcache.sharing.pull import pull
from geomcache.sharing.push import push
from geomcache.sharing.remote_check import verify_address
from tests.support.servers import Wire, patient_s3, s3_wire
from tests.support.sharing import RAY, SPEC, assert_reads, contents, fill_shifted, make_small_store, said
from tests.support.stores import (
    LENGTHS,
    as_lengths,
    claim_rows,
    commit,
    fill,
    make_dataset_spec,
    make_identities,
    make_maps,
    make_spec,
)

__all__ = ["patient_s3", "s3_wire", "said"]

MEMORY, S3 = "memory://made-up.zarr", "s3://bucket/caches/made-up.zarr"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work folders of the test's own, leases that run out soon, and an empty memory."""
    monkeypatch.setenv("GEOMCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    monkeypatch.setattr(lease, "LEASE_S", 0.5)
    monkeypatch.setattr(base, "FIRST_PAUSE_S", 0.01)
    yield
    fsspec.filesystem("memory").store.clear()


def open_address(
    address: str, wanted: tuple[tuple[int, int], ...] = ((0, 90),), *, overwrite: bool = False, **fields: object
) -> AddressWriter:
    return AddressWriter.create_or_open(
        address,
        fields.get("spec", SPEC),  # type: ignore[arg-type]
        make_dataset_spec(),
        as_lengths(LENGTHS),
        wanted,
        identities=make_identities(),
        overwrite=overwrite,
    )


def make_at(address: str, wanted: tuple[tuple[int, int], ...] = ((0, 90),)) -> list[int]:
    with open_address(address, wanted) as writer:
        made = fill(writer)
        assert writer.seal()
    return made


def objects(address: str) -> dict[str, bytes]:
    driver, root = fsspec.url_to_fs(address)
    driver.invalidate_cache()
    return {path.removeprefix(f"{root}/"): driver.cat_file(path) for path in driver.find(root)}


@pytest.mark.parametrize("address", [MEMORY, S3, "file://TMP/bucket/made-up.zarr"])
def test_the_objects_are_the_files_of_a_cache_in_a_folder(tmp_path: Path, s3_wire: Wire, address: str) -> None:
    address = address.replace("TMP", str(tmp_path))
    path = make_small_store(tmp_path / "here.zarr")
    assert make_at(address) == [0, 1, 2, 3, 4, 5]
    assert objects(address) == contents(path)
    assert not work_folder(address).exists()
    assert make_at(address) == []  # nothing to do
    assert objects(address) == contents(path)
    assert verify_address(address).problems == ()
    pull(address, tmp_path / "copy.zarr")
    assert contents(tmp_path / "copy.zarr") == contents(path)


def test_a_half_made_cache_is_recognised_and_resumed(tmp_path: Path, said: list[str]) -> None:
    with open_address(MEMORY) as writer:
        assert fill(writer, 2) == [0, 1]
        assert not writer.seal()
    there = objects(MEMORY)
    assert "manifest.json" not in there
    lines = [there[f"journal/{number}.json"] for number in range(3)]
    assert [decode_line(line)["record"] for line in lines] == ["begin", "commit", "commit"]
    store = geomcache.open(MEMORY)
    assert not store.sealed
    assert store.rows == ((0, 32),)
    report = verify_address(MEMORY)
    assert (report.sealed, report.frames) == (False, 32)
    assert [problem.file for problem in report.problems] == ["manifest.json"]
    with pytest.raises(CacheIncompleteError, match=r"memory://.*geomcache extract"):
        pull(MEMORY, tmp_path / "copy.zarr")
    with pytest.raises(CacheExistsError, match=r"memory://.*geomcache extract"):
        push(make_small_store(tmp_path / "here.zarr"), MEMORY)
    assert make_at(MEMORY) == [2, 3, 4, 5]
    assert objects(MEMORY) == contents(tmp_path / "here.zarr")


def test_several_threads_may_commit_at_once(tmp_path: Path) -> None:
    path = make_small_store(tmp_path / "here.zarr")
    with open_address(MEMORY) as writer:
        claims = [claim for _ in range(6) if (claim := writer.claim())]
        with ThreadPoolExecutor(4) as threads:
            for future in [threads.submit(commit, writer, each, make_maps(SPEC, claim_rows(each))) for each in claims]:
                future.result()
        assert writer.seal()
    there, here = objects(MEMORY), contents(path)
    assert there.keys() == here.keys()
    assert [name for name in here if there[name] != here[name]] in ([], ["journal.jsonl"])  # in another order
    assert verify_address(MEMORY).problems == ()


def test_a_cache_at_an_address_is_extended(tmp_path: Path) -> None:
    path = make_small_store(tmp_path / "here.zarr", [(0, 20)])
    make_at(MEMORY, ((0, 20),))
    assert objects(MEMORY) == contents(path)
    assert make_at(MEMORY) == [1, 2, 3, 4, 5]  # shard 1 gains rows
    make_small_store(path)
    assert objects(MEMORY) == contents(path)
    with open_address(MEMORY, ((0, 20),)) as writer:  # fewer rows than there are
        assert fill(writer) == []
        assert writer.seal()
    assert objects(MEMORY) == contents(path)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_a_driver_that_dies_between_any_two_requests_costs_its_shard_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """It is killed at the n-th change of the store, for every n; the next one takes over when the lease has run out."""
    path = make_small_store(tmp_path / "here.zarr", [(0, 40)])
    expected = contents(path)
    make_at(MEMORY, ((0, 40),))
    memory = fsspec.filesystem("memory")
    kind, changes, at, is_dead = type(memory), 0, -1, False
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    monkeypatch.setattr(lease, "LEASE_S", 0.1)

    class Dead(BaseException):
        pass

    def counted(name: str) -> None:
        operation = getattr(kind, name)

        def wrapped(self: object, path: str, *arguments: object, **options: object) -> object:
            nonlocal changes, is_dead
            if "/lease/" not in path:
                changes += 1
                is_dead |= 0 <= at < changes
                if is_dead:
                    raise Dead
            if is_dead:
                return None  # a dead driver does not renew its lease, nor release it
            return operation(self, path, *arguments, **options)

        monkeypatch.setattr(kind, name, wrapped)

    for name in ("pipe_file", "rm_file"):
        counted(name)
    monkeypatch.setattr(base, "PARALLEL_TRANSFERS", 1)
    killed = 0
    for at in range(1, 60, every):
        memory.store.clear()
        changes = 0
        try:
            make_at(MEMORY, ((0, 40),))
        except Dead:
            killed += 1
        else:
            break
        at, changes, is_dead = -1, 0, False
        committed = len([name for name in objects(MEMORY) if name.startswith("journal/")]) - 1
        sealed = "manifest.json" in objects(MEMORY)
        made = make_at(MEMORY, ((0, 40),))
        assert objects(MEMORY) == expected
        assert sealed or len(made) == 3 - max(0, committed)
    assert killed > 30 // every


def two_drivers(address: str) -> list[object]:
    """What came of two drivers that start at once: None of one that wins, which ends when the other has."""
    start, lost, outcomes = threading.Barrier(2), threading.Event(), list[object]()

    def drive() -> None:
        remote = ConditionalRemote(address)
        start.wait()
        try:
            held = Lease(remote)
            lost.wait(30)
            held.check()
            held.release(sealed=False)
        except Exception as error:  # noqa: BLE001 - compared by the test
            lost.set()
            outcomes.append(error)
        else:
            outcomes.append(None)

    drivers = [threading.Thread(target=drive) for _ in range(2)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    return outcomes


@pytest.mark.parametrize("times", [pytest.param(10, marks=pytest.mark.slow), 2])
def test_of_two_drivers_at_once_one_wins_and_the_other_says_so(
    tmp_path: Path, s3_wire: Wire, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Both start at the same moment, several times; the loser names the winner."""
    monkeypatch.setattr(lease, "LEASE_S", 10.0)
    path = make_small_store(tmp_path / "here.zarr")
    for number in range(times):
        address = f"s3://bucket/both-{number}.zarr"
        outcomes = two_drivers(address)
        assert outcomes.count(None) == 1
        (loser,) = [outcome for outcome in outcomes if outcome is not None]
        assert isinstance(loser, CacheLockedError)
        assert address in str(loser)
    with open_address(S3) as writer:
        fill(writer, 1)
        with pytest.raises(CacheLockedError, match=rf"{S3}: .*process \d+ on "):
            open_address(S3)
        fill(writer)
        assert writer.seal()
    assert objects(S3) == contents(path)


def test_a_driver_that_continues_after_a_stop_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_small_store(tmp_path / "here.zarr")
    stopped = open_address(MEMORY)
    assert fill(stopped, 1) == [0]
    stop_renewals(stopped)
    monkeypatch.setenv("GEOMCACHE_HOME", str(tmp_path / "other-machine"))
    with open_address(MEMORY) as writer:  # after the lease has run out
        assert fill(writer, 1) == [1]
        with pytest.raises(CacheLockedError, match=r"memory://made-up.zarr/"):
            fill_shifted(stopped, 7)  # its shard 1 has other numbers, as of another GPU
        assert fill(writer) == [2, 3, 4, 5]
        assert writer.seal()
    stopped.close()
    assert {name: content for name, content in objects(MEMORY).items() if "lease" not in name} == contents(path)


def stop_renewals(writer: AddressWriter) -> None:
    """As in a process that was stopped."""
    writer._lease._ended.set()
    writer._lease._thread.join()


def test_a_lease_that_is_not_renewed_ends_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_address(MEMORY) as writer:
        fill(writer, 1)
        stop_renewals(writer)
        monkeypatch.setattr(lease, "_clock", lambda: time.clock_gettime(time.CLOCK_BOOTTIME) + lease.FRESH_S + 1)
        with pytest.raises(ConnectionFailedError, match=r"lease/1.json"):
            fill(writer, 1)


def test_a_store_that_ignores_the_condition_is_refused(s3_wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = type(fsspec.filesystem("s3"))
    pipe_file = driver._pipe_file

    async def without_condition(self: object, path: str, data: bytes, **options: object) -> object:
        return await pipe_file(self, path, data, **(options | {"mode": "overwrite"}))

    monkeypatch.setattr(driver, "_pipe_file", without_condition)
    driver.clear_instance_cache()
    with pytest.raises(RemoteError, match=rf"{S3}: .*If-None-Match"):
        open_address(S3)


def test_connections_cut_at_random_with_latency_change_nothing(
    tmp_path: Path, patient_s3: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_small_store(tmp_path / "here.zarr")
    monkeypatch.setattr(lease, "LEASE_S", 20.0)
    patient_s3.latency_s = 0.005
    patient_s3.cut_at_random(20_000, seed=1)
    for attempt in range(20):
        try:
            make_at(S3)
        except ConnectionFailedError as error:
            assert S3 in str(error)
        else:
            break
        assert attempt < 19
    assert patient_s3.cuts > 5
    patient_s3.mend()
    assert objects(S3) == contents(path)


def test_an_answer_that_is_lost_is_no_other_driver(s3_wire: Wire) -> None:
    remote = ConditionalRemote(S3)
    assert remote.create("warm", b"up")
    s3_wire.cut_after(10, once=True)  # the object is written, its answer is cut
    assert remote.create("journal/0.json", b"a line")
    assert s3_wire.cuts == 1
    assert not remote.create("journal/0.json", b"another")
    assert remote.read("journal/0.json") == b"a line"


def test_an_object_that_arrives_damaged_is_found_and_sent_again(
    tmp_path: Path, s3_wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = type(fsspec.filesystem("s3"))
    pipe_file, damaged = driver._pipe_file, list[str]()

    async def damage_once(self: object, path: str, data: bytes, **options: object) -> object:
        if path.endswith(f"{RAY}/c.2.0.0.0") and not damaged:
            damaged.append(path)
            data = data[:-1] + bytes([data[-1] ^ 1])
        return await pipe_file(self, path, data, **options)

    monkeypatch.setattr(driver, "_pipe_file", damage_once)
    driver.clear_instance_cache()
    path = make_small_store(tmp_path / "here.zarr")
    make_at(S3)
    assert damaged
    assert objects(S3) == contents(path)


def test_a_store_with_checksums_of_another_kind_is_read_back(
    tmp_path: Path, s3_wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ETag is no md5 where the store encrypts with keys of its own."""
    monkeypatch.setattr(ConditionalRemote, "reported", lambda self, entry: "opaque")
    path = make_small_store(tmp_path / "here.zarr")
    make_at(S3)
    assert objects(S3) == contents(path)


def test_an_object_that_changed_is_found_before_the_seal(s3_wire: Wire) -> None:
    name = f"{RAY}/c.1.0.0.0"
    with open_address(S3) as writer:
        fill(writer)
        there = fsspec.filesystem("s3").cat_file(f"{S3}/{name}")
        fsspec.filesystem("s3").pipe_file(f"{S3}/{name}", bytes(len(there)))
        with pytest.raises(OSError, match=f"{S3}/{name}"):
            writer.seal()
    assert "manifest.json" not in objects(S3)


def test_damage_at_an_address_is_found_and_what_is_removed_is_made_again(tmp_path: Path, said: list[str]) -> None:
    path = make_small_store(tmp_path / "here.zarr")
    make_at(MEMORY)
    memory, name = fsspec.filesystem("memory"), f"{RAY}/c.3.0.0.0"
    content = memory.cat_file(f"{MEMORY}/{name}")
    memory.pipe_file(f"{MEMORY}/{name}", content[:100] + bytes([content[100] ^ 1]) + content[101:])
    report = verify_address(MEMORY)
    assert [(problem.file, problem.shard) for problem in report.problems] == [(name, 3)]
    assert f"{MEMORY}/{name}" in report.problems[0].message
    assert "extract" in [*report.lines()][-1]
    memory.rm_file(f"{MEMORY}/{name}")
    assert make_at(MEMORY) == [3]
    assert any("shard 3" in line and name in line for line in said)
    there = objects(MEMORY)
    assert {name: there[name] for name in there if name != "journal.jsonl"} == {
        name: content for name, content in contents(path).items() if name != "journal.jsonl"
    }
    pull(MEMORY, tmp_path / "copy.zarr")
    assert verify(tmp_path / "copy.zarr").problems == ()
    assert_reads(tmp_path / "copy.zarr", list(range(90)))


def test_what_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"hf://datasets/me/cache .*geomcache push"):
        open_address("hf://datasets/me/cache")
    fsspec.filesystem("memory").pipe_file("/other/notes.txt", b"mine")
    with pytest.raises(CacheExistsError, match=r"memory://other: .*notes.txt"):
        open_address("memory://other")
    assert objects("memory://other") == {"notes.txt": b"mine"}
    make_at(MEMORY)
    other = make_spec(cameras=("observation.images.front",), outputs=("ray",), process_res=112)
    with pytest.raises(CacheMismatchError, match=rf"{MEMORY}: spec.process_res: .*56.*112"):
        open_address(MEMORY, spec=other)
    assert not any(name.startswith("lease") for name in objects(MEMORY))  # a sealed cache is left as it was
    with open_address(MEMORY, spec=other, overwrite=True) as writer:
        fill(writer)
        assert writer.seal()
    assert geomcache.open(MEMORY).spec == other


def test_a_push_that_was_interrupted_is_replaced_by_an_extraction(tmp_path: Path) -> None:
    path = make_small_store(tmp_path / "here.zarr")
    push(path, MEMORY)
    memory = fsspec.filesystem("memory")
    for name in ("manifest.json", "journal.jsonl", f"{RAY}/c.2.0.0.0"):
        memory.rm_file(f"{MEMORY}/{name}")
    memory.pipe_file(f"{MEMORY}/manifest.json.tmp", b"{}")
    assert len(make_at(MEMORY)) == 6
    assert objects(MEMORY) == contents(path)


def test_the_lease_names_its_holder() -> None:
    with open_address(MEMORY):
        held = json.loads(objects(MEMORY)["lease/1.json"])
    assert {"host", "pid", "began"} <= held.keys()
    assert json.loads(objects(MEMORY)["lease/1.json"])["released"]


def test_frames_of_a_half_made_cache_are_read(tmp_path: Path) -> None:
    with open_address(MEMORY) as writer:
        fill(writer, 3)
    remote = geomcache.open(MEMORY)
    local = GeometryStore.open(make_small_store(tmp_path / "here.zarr"))
    assert (remote.batch([0, 40]).ray == local.batch([0, 40]).ray).all()
