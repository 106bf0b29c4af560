"""A cache comes whole or not at all, matches the run or is refused, and replaces nothing but a cache."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from geomcache.cache import durable, locks
from geomcache.cache.create import create
from geomcache.cache.header import Header
from geomcache.cache.store import GeometryStore
from geomcache.cache.writer import StoreWriter
from geomcache.errors import (
    CacheCorruptError,
    CacheExistsError,
    CacheFormatError,
    CacheLockedError,
    CacheMismatchError,
    UserInputError,
)
from tests.support.stores import (
    CAMERAS,
    LENGTHS,
    Faults,
    Killed,
    as_lengths,
    fill,
    make_dataset_spec,
    make_identities,
    make_spec,
    make_store,
    open_writer,
    output_of,
    run_python,
)


def test_a_new_cache_holds_nothing_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "cache.zarr"
    with open_writer(path) as writer:
        assert (writer.path, writer.shard_frames) == (path, 16)
    store = GeometryStore.open(path)
    assert (store.sealed, store.rows, store.nbytes) == (False, (), 0)
    assert {file.name for file in path.iterdir()} == {
        "zarr.json",
        "journal.jsonl",
        "lock",
        "episodes",
        "episode_index",
        "frame_index",
        "frame_crc32c",
        "picture_hash",
        "picture_means",
        *CAMERAS,
    }
    assert [file.name for file in path.parent.iterdir()] == ["cache.zarr"]


def test_a_kill_at_any_file_operation_leaves_no_cache_or_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults, path, at, outcomes = Faults(monkeypatch), tmp_path / "cache", 0, set()
    while True:
        faults.start(at)
        try:
            open_writer(path).close()
        except Killed:
            pass
        else:
            break
        faults.start()
        outcomes.add(path.exists())
        if path.exists():
            assert GeometryStore.open(path).rows == ()
            shutil.rmtree(path)
        at += 1 if at > faults.count - 8 else 3  # every metadata file is synchronised alike
    assert outcomes == {False, True}
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]  # what the killed ones left was removed
    assert at > 30


def test_a_creation_at_work_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache"
    script = """
import sys
from pathlib import Path
from geomcache.cache import create as creation
from tests.support.stores import open_writer
fill = creation._fill
def slow(*arguments):
    print("at work", flush=True)
    sys.stdin.readline()
    fill(*arguments)
creation._fill = slow
print(open_writer(Path(sys.argv[1])).frames_done())
"""
    other = run_python(script, path)
    assert other.stdout is not None
    assert other.stdout.readline() == "at work\n"
    make_store(path, [(0, 5)])
    assert len(list(tmp_path.iterdir())) == 2
    assert output_of(other) == "5\n"  # it lost, and opened ours
    assert GeometryStore.open(path).rows == ((0, 5),)
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("content", ["file", "folder", "empty", "zarr"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_cache_is_left_alone(tmp_path: Path, content: str, overwrite: bool) -> None:
    path = tmp_path / "cache"
    if content == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        if content != "empty":
            (path / "mine").write_text("mine")
        if content == "zarr":
            (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    before = {file: file.read_bytes() if file.is_file() else None for file in tmp_path.rglob("*")}
    with pytest.raises(CacheExistsError, match=f"{path}: expected a cache"):
        open_writer(path, overwrite=overwrite)
    assert before == {file: file.read_bytes() if file.is_file() else None for file in tmp_path.rglob("*")}


SPEC, DATASET = make_spec(), make_dataset_spec()


REVERSED_SHA256 = hashlib.sha256(make_identities()[::-1].tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("field", "spec", "dataset"),
    [
        ("spec.weights_sha256", {"weights_sha256": "ff" * 32}, {}),
        ("spec.model_name", {"model_name": "da3-large"}, {}),
        ("spec.model_revision", {"model_revision": "abc"}, {}),
        ("spec.da3_version", {"da3_version": "0.2.0"}, {}),
        ("spec.views", {"views": "independent"}, {}),
        ("spec.cameras", {"cameras": CAMERAS[::-1]}, {}),
        ("spec.process_res", {"process_res": 112}, {}),
        ("spec.grid", {"grid": "patch"}, {}),
        ("spec.grid_hw", {"grid_hw": (4, 3)}, {}),
        ("spec.outputs", {"outputs": ("ray",)}, {}),
        ("spec.compute_dtype", {"compute_dtype": "bf16"}, {}),
        ("dataset.fps", {}, {"fps": 20}),
        ("dataset.identities_sha256", {}, {"identities_sha256": REVERSED_SHA256}),
        ("dataset.decoder", {}, {"decoder": "pyav"}),
    ],
)
def test_other_settings_are_refused_by_name(
    tmp_path: Path, field: str, spec: dict[str, Any], dataset: dict[str, Any]
) -> None:
    path = make_store(tmp_path / "cache", [(0, 5)])
    wanted_spec, wanted_dataset = make_spec(**{"grid": "3x4"} | spec), make_dataset_spec(**dataset)
    identities = make_identities()[:: -1 if "identities_sha256" in dataset else 1]
    with pytest.raises(CacheMismatchError) as caught:
        open_writer(path, spec=wanted_spec, dataset=wanted_dataset, identities=identities)
    part, name = field.split(".")
    cached, wanted = (SPEC, wanted_spec) if part == "spec" else (DATASET, wanted_dataset)
    assert (caught.value.field, caught.value.cached, caught.value.wanted) == (
        field,
        cached.to_dict()[name],
        wanted.to_dict()[name],
    )
    assert f"cache: {field}: the cache was made with {cached.to_dict()[name]}, this run has" in str(caught.value)
    assert GeometryStore.open(path).sealed


def test_other_episode_lengths_are_refused(tmp_path: Path) -> None:
    path = make_store(tmp_path / "cache", [(0, 5)])
    with pytest.raises(CacheMismatchError, match=r"dataset\.episodes_sha256: "):
        open_writer(path, lengths=(30, 20, 25, 15))
    with pytest.raises(CacheMismatchError, match=r"dataset\.frames: .* 90\b.* 95\b"):
        open_writer(path, lengths=(20, 30, 25, 20))


def test_labels_may_differ(tmp_path: Path) -> None:
    path = make_store(tmp_path / "cache", [(0, 5)])
    with open_writer(path, spec=make_spec(model_id="copy"), dataset=make_dataset_spec(repo_id="copy")) as writer:
        assert writer.frames_done() == 5
        assert (writer.spec.model_id, writer.dataset.repo_id) == ("made-up", "tests/made-up")  # the cache keeps its own


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((20, 30, 25), "expected 4 of at least 1 frame and 90 together, got 3 and 75"),
        ((20, 30, 40, 0), "expected 4 of at least 1 frame"),
        ((30, 20, 25, 15), "expected sha256"),
    ],
)
def test_lengths_that_are_not_the_datasets_are_refused(tmp_path: Path, lengths: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        StoreWriter.create_or_open(tmp_path / "cache", SPEC, DATASET, as_lengths(lengths), [(0, 5)])
    assert not (tmp_path / "cache").exists()


def test_overwrite_replaces_a_cache_of_any_settings(tmp_path: Path) -> None:
    path = make_store(tmp_path / "cache")
    with open_writer(path, [(0, 5)], spec=make_spec(process_res=112), overwrite=True) as writer:
        assert writer.frames_done() == 0
        fill(writer)
        assert writer.seal()
    store = GeometryStore.open(path)
    assert (store.spec.process_res, store.rows) == (112, ((0, 5),))
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


def test_overwrite_replaces_a_damaged_cache_and_what_a_link_leads_to(tmp_path: Path) -> None:
    path = make_store(tmp_path / "real" / "cache")
    header = json.loads((path / "zarr.json").read_bytes())
    header["attributes"]["geomcache"]["schema_version"] = 99
    (path / "zarr.json").write_text(json.dumps(header))
    (path / "journal.jsonl").unlink()
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(CacheFormatError, match="schema version 1 or 2, found 99"):
        open_writer(tmp_path / "link")
    open_writer(tmp_path / "link", overwrite=True).close()
    assert (tmp_path / "link").is_symlink()
    assert GeometryStore.open(path).rows == ()


def test_overwrite_of_nothing_creates(tmp_path: Path) -> None:
    open_writer(tmp_path / "cache", overwrite=True).close()
    assert GeometryStore.open(tmp_path / "cache").rows == ()


OPEN = """
import sys
from pathlib import Path
from tests.support.stores import claim_rows, commit, make_maps, open_writer
writer = open_writer(Path(sys.argv[1]))
claim = writer.claim() if sys.argv[2] == "claim" else None
print("open", flush=True)
sys.stdin.readline()
claim = claim or writer.claim()
commit(writer, claim, make_maps(writer.spec, claim_rows(claim)))
"""


@pytest.mark.parametrize("state", ["claim", "no claim"])
def test_a_cache_that_anybody_has_open_is_not_replaced(tmp_path: Path, state: str) -> None:
    """Without the refusal both write into the new cache's journal, which then belongs to neither."""
    path = tmp_path / "cache"
    other = run_python(OPEN, path, state)
    assert other.stdout is not None
    assert other.stdout.readline() == "open\n"
    for spec in (None, make_spec(outputs=("ray",))):
        with pytest.raises(CacheLockedError, match=f"{path}: .*in use"):
            open_writer(path, spec=spec, overwrite=True)
    output_of(other)
    assert GeometryStore.open(path).rows == ((0, 16),)
    with open_writer(path), pytest.raises(CacheLockedError, match=f"{path}: .*in use"):
        open_writer(path, overwrite=True)  # nor one that this process has open
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


def test_a_cache_that_was_replaced_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = make_store(tmp_path / "cache", [(0, 5)])
    header = Header.read(path)
    open_writer(path, codec="zstd", overwrite=True).close()  # the same fingerprint
    with pytest.raises(CacheLockedError, match=str(path)):
        StoreWriter(path, header, as_lengths(LENGTHS), ((0, 5),))


def test_a_cache_that_another_process_just_made_is_not_replaced_unasked(tmp_path: Path) -> None:
    path = make_store(tmp_path / "cache", [(0, 5)])
    create(
        path, Header.new(SPEC, DATASET), as_lengths(LENGTHS), make_identities()
    )  # as if it had not been there a moment ago
    assert GeometryStore.open(path).rows == ((0, 5),)


def without_exchange(patch: pytest.MonkeyPatch) -> None:
    """As on NFS: names can be changed one by one alone."""
    patch.setattr(durable, "exchange", lambda one, other: False)


@pytest.mark.parametrize("exchanged", [True, False])
def test_a_failed_swap_leaves_the_old_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanged: bool) -> None:
    path = make_store(tmp_path / "cache")

    def exchange(one: Path, other: Path) -> bool:
        if exchanged:
            raise OSError(errno.EIO, "played", str(other))
        return False

    def rename(source: Path, target: Path) -> None:
        if target == path and GeometryStore.open(source).rows == ():
            raise OSError(errno.EIO, "played", str(target))
        source.rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "rename", rename)
        patch.setattr(durable, "exchange", exchange)
        with pytest.raises(OSError, match=rf"played.*{path}"):
            open_writer(path, overwrite=True)
    assert GeometryStore.open(path).rows == ((0, 90),)
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("exchanged", [True, False])
def test_a_kill_at_any_file_operation_of_a_swap_leaves_a_whole_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanged: bool
) -> None:
    """And the next run removes all that the killed ones left. One name after the other: there may be none between."""
    old = make_store(tmp_path / "old", [(0, 5)])
    if not exchanged:
        without_exchange(monkeypatch)
    faults, path, outcomes = Faults(monkeypatch), tmp_path / "folder" / "cache", set()
    faults.start()
    path.parent.mkdir()
    shutil.copytree(old, path)
    open_writer(path, overwrite=True).close()
    last = faults.count
    for at in range(last - 25, last):  # the end of the creation, the swap and the removal
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(old, path)
        faults.start(at)
        with contextlib.suppress(Killed):
            open_writer(path, overwrite=True).close()
        faults.start()
        outcomes.add(GeometryStore.open(path).rows if path.exists() else None)
    open_writer(path, overwrite=True).close()
    assert [file.name for file in path.parent.iterdir()] == ["cache"]
    assert outcomes == {((0, 5),), ()} if exchanged else outcomes == {((0, 5),), (), None}


@pytest.mark.parametrize("content", [[], ["zarr.json"], ["lock"], ["lock", "zarr.json"]])
def test_what_a_killed_creation_left_is_removed(tmp_path: Path, content: list[str]) -> None:
    """With and without the lock, which is the first file in such a folder, and the last."""
    draft = tmp_path / ".cache.0123abcd.geomcache-tmp"
    draft.mkdir()
    for name in content:
        (draft / name).touch()
    (tmp_path / ".cache.notes.geomcache-tmp").mkdir()
    (tmp_path / ".cache.01234567.geomcache-tmp").symlink_to(tmp_path / ".cache.notes.geomcache-tmp")
    open_writer(tmp_path / "cache").close()
    assert {file.name for file in tmp_path.iterdir()} == {
        "cache",
        ".cache.notes.geomcache-tmp",
        ".cache.01234567.geomcache-tmp",
    }


def test_a_draft_that_another_creation_removed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the making of the folder and that of its lock, another creation takes it for an abandoned one."""
    removed: list[Path] = []

    class Late(locks.LockFile):
        def __init__(self, path: Path) -> None:
            if path.parent.name.endswith(".geomcache-tmp") and len(removed) < 2:
                removed.append(path.parent)
                path.parent.rmdir()
            super().__init__(path)

    monkeypatch.setattr(locks, "LockFile", Late)
    open_writer(tmp_path / "cache").close()
    assert len({*removed}) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


CREATE = """
import sys
from pathlib import Path
from tests.support.stores import open_writer
for line in sys.stdin:
    open_writer(Path(line.strip())).close()
    print("open", flush=True)
"""


def test_many_creators_at_once_make_one_cache(tmp_path: Path) -> None:
    """None fails, whatever it sees of the others."""
    processes = [run_python(CREATE) for _ in range(3)]
    for number in range(8):
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(f"{tmp_path / str(number)}\n")
            process.stdin.flush()
    for process in processes:
        assert output_of(process) == 8 * "open\n"
    assert {file.name for file in tmp_path.iterdir()} == {*map(str, range(8))}


def test_an_old_cache_that_cannot_be_removed_is_removed_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(durable, "remove_tree", lambda path: path.rmdir())
        with pytest.raises(OSError, match=os.strerror(errno.ENOTEMPTY)):
            open_writer(path, overwrite=True)
    assert GeometryStore.open(path).rows == ()
    assert len(list(tmp_path.iterdir())) == 2
    open_writer(path, overwrite=True).close()
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    "key", ["../up", "a/b", "/etc", "..", ".hidden", "", "a\\b", "a\0b", "zarr.json", "episodes", "é", "x" * 300]
)
def test_camera_keys_cannot_lead_elsewhere(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserInputError, match="camera key"):
        open_writer(tmp_path / "cache", spec=make_spec(cameras=(key,)))
    path = make_store(tmp_path / "cache", [(0, 5)])
    header = json.loads((path / "zarr.json").read_bytes())
    header["attributes"]["geomcache"]["spec"]["cameras"][0]["key"] = key
    (path / "zarr.json").write_text(json.dumps(header))
    with pytest.raises(CacheFormatError, match="camera key"):
        GeometryStore.open(path)


def _set(*keys: str, to: object) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("schema_version", to=3), "schema version 1 or 2, found 3"),
        (_set("schema_version", to=1), "dataset: .*schema version 1"),
        (_set("schema_version", to="1"), "schema version 1 or 2, found '1'"),
        (_set("codec", to="lz4"), "codec: .*raw or zstd.*'lz4'"),
        (_set("codec", to=None), "codec: .*raw or zstd.*None"),
        (_set("shard_frames", to=24), "shard_frames: .*16 to 65536.*24"),
        (_set("shard_frames", to=2**40), "shard_frames: .*16 to 65536.*1099511627776"),
        (_set("shard_frames", to=16.0), "shard_frames: .*16 to 65536.*16.0"),
        (_set("shard_frames", to=True), "shard_frames: .*16 to 65536.*True"),
        (_set("spec", to=[]), "spec: .*object.*array"),
        (_set("spec", "grid_hw", to=[3, 4, 5]), "spec.grid_hw: .*2.*3"),
        (_set("spec", "grid_hw", to=[10**9, 4]), "grid: .*1 to 9999.*1000000000"),
        (_set("spec", "process_res", to=None), "spec.process_res: .*int.*null"),
        (_set("spec", "extra", to=1), "spec.extra: .*1"),
        (_set("dataset", "frames", to=2**50), "dataset: .*1099511627776.*1125899906842624"),
        (_set("dataset", "frames", to=-1), "frames >= 1.*-1"),
        (_set("dataset", "fps", to=10**300), "dataset: .*1099511627776.*1000"),
        (_set("schema_version", to=1.0), "schema version 1 or 2, found 1.0"),
        (_set("schema_version", to=True), "schema version 1 or 2, found True"),
        (_set("codec", to=[]), r"codec: .*raw or zstd.*\[\]"),
        (_set("dataset", "repo_id", to="a\x1b[2J"), r"dataset.repo_id: .*x1b"),
        (_set("spec", "process_res", to=112), "fingerprint: .*[0-9a-f]{64}.*[0-9a-f]{64}"),
        (_set("fingerprint", to=None), "fingerprint: .*[0-9a-f]{64}.*None"),
    ],
)
def test_changed_attributes_are_told(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    path = make_store(tmp_path / "cache", [(0, 5)])
    header = json.loads((path / "zarr.json").read_bytes())
    change(header["attributes"]["geomcache"])
    (path / "zarr.json").write_text(json.dumps(header))
    with pytest.raises((CacheFormatError, CacheCorruptError), match=r"zarr.json: .*" + message):
        GeometryStore.open(path)
    with pytest.raises((CacheFormatError, CacheCorruptError), match=r"zarr.json: .*" + message):
        open_writer(path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b"[" * 100_000, b'{"attributes": {"geomcache": 7}}', b"\xff"]
)
def test_other_files_are_no_cache(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cache"
    path.mkdir()
    (path / "zarr.json").write_bytes(content)
    with pytest.raises(CacheFormatError, match=r"zarr\.json: .*'geomcache'"):
        GeometryStore.open(path)


def test_every_changed_byte_of_a_sealed_header_is_told(tmp_path: Path) -> None:
    path = make_store(tmp_path / "cache", [(0, 5)])
    content = bytearray((path / "zarr.json").read_bytes())
    for at in range(0, len(content), 7):
        content[at] ^= 1
        (path / "zarr.json").write_bytes(content)
        with pytest.raises((CacheFormatError, CacheCorruptError)):
            GeometryStore.open(path)
        content[at] ^= 1


def test_the_episode_table_is_as_the_run_gave_it(tmp_path: Path) -> None:
    store = GeometryStore.open(make_store(tmp_path / "cache", [(0, 5)]))
    assert store.episode_length.tolist() == list(LENGTHS)
    assert store.episode_start.tolist() == [0, 20, 50, 75]
