"""The power fails: what was not fsynced is lost, torn or out of order, and what was acknowledged is there."""

import random
import shutil
from pathlib import Path

import pytest

from tests.faults.common import SHORT, Figure, few_or_many, finish, held_rows
from tests.faults.power import Disk, Inode, Recorder, choices
from tests.support.stores import claim_rows, commit, make_maps, make_store, open_writer


@few_or_many("states", 1, 60)
@pytest.mark.parametrize("start", ["empty", "half"])
def test_nothing_acknowledged_is_lost_with_the_power(tmp_path: Path, start: str, states: int, figure: Figure) -> None:
    original = tmp_path / "original"
    if start == "half":
        make_store(original, [(8, 24)], lengths=SHORT)
    else:
        open_writer(original, lengths=SHORT).close()
    before = held_rows(original)
    path = shutil.copytree(original, tmp_path / "recorded")
    acknowledged: list[tuple[int, list[int]]] = []  # (after how many operations, rows)
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch, path)
        with open_writer(path, lengths=SHORT) as writer:
            while (claim := writer.claim()) is not None:
                commit(writer, claim, make_maps(writer.spec, claim_rows(claim)))
                acknowledged.append((len(recorder.operations), claim_rows(claim)))
            assert writer.seal()
    assert len(acknowledged) == 2
    generator, tried = random.Random(0), 0
    for count in range(0, len(recorder.operations) + 1, 1 if states > 1 else 5):
        disk = Disk(original)
        for operation in recorder.operations[:count]:
            disk.apply(operation)
        for number, choice in enumerate(choices(generator, states)):
            after = tmp_path / f"{count}-{number}"
            disk.write_to(after, choice)
            held = held_rows(after)  # a wrong number fails
            for at, rows in acknowledged:
                assert at > count or {*rows} <= held
            assert len({row // 16 for row in before - held}) <= 1  # the shard that was being replaced
            if number % 4 == 0:
                finish(after, SHORT)
            shutil.rmtree(after)
            tried += 1
    figure(f"{len(recorder.operations)} operations, {tried} states")


def test_the_model_loses_what_was_not_synchronised() -> None:
    """A write is lost, torn or kept, and a gap in front of one that is kept reads as zeros."""
    inode = Inode(b"abc", [(3, b"defg"), (2, None)])
    assert inode.after(lambda: 0.0) == b"abc"
    assert inode.after(lambda: 0.49) == b"abcde"
    assert inode.after(lambda: 1.0) == b"ab"
    assert Inode(b"", [(2, b"xy")]).after(lambda: 1.0) == b"\0\0xy"


def test_the_model_renames_and_synchronises(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").write_bytes(b"1")
    disk = Disk(tmp_path / "disk")
    draft, name = Path("new.tmp"), Path("new")
    for operation in (
        ("create", draft),
        ("write", draft, 0, b"content"),
        ("rename", draft, name),
        ("unlink", Path("old")),
    ):
        disk.apply(operation)
    for share, files in ((0.0, {"old": b"1"}), (1.0, {"new": b"content"})):
        disk.write_to(tmp_path / str(share), lambda: share)  # noqa: B023 - used in this round
        assert {path.name: path.read_bytes() for path in (tmp_path / str(share)).iterdir()} == files
    disk.apply(("sync", Path()))  # the folder, not the file: a name without its content
    disk.write_to(tmp_path / "names", lambda: 0.0)
    assert {path.name: path.read_bytes() for path in (tmp_path / "names").iterdir()} == {"new": b""}
    disk.apply(("sync", name))
    disk.write_to(tmp_path / "all", lambda: 0.0)
    assert {path.name: path.read_bytes() for path in (tmp_path / "all").iterdir()} == {"new": b"content"}


def test_a_protocol_without_fsync_would_be_caught(tmp_path: Path) -> None:
    """The same recording without the folders' fsyncs loses an acknowledged shard: the model sees the difference."""
    original = tmp_path / "original"
    open_writer(original, lengths=SHORT).close()
    path = shutil.copytree(original, tmp_path / "recorded")
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch, path)
        with open_writer(path, lengths=SHORT) as writer:
            claim = writer.claim()
            assert claim is not None
            commit(writer, claim, make_maps(writer.spec, claim_rows(claim)))
    disk = Disk(original)
    for operation in recorder.operations:
        if not (operation[0] == "sync" and operation[1] not in disk.names):
            disk.apply(operation)
    disk.write_to(tmp_path / "after", lambda: 0.0)
    with pytest.raises(OSError, match=r"/c\.\d.*: episode \d+ frame \d+: .*none"):
        held_rows(tmp_path / "after")
