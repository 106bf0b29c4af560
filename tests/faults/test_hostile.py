"""Files that somebody made up: an error of ours, or the right numbers; nothing outside the cache, little memory."""

import contextlib
import json
import shutil
import tracemalloc
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geomcache.cache.create import is_cache
from geomcache.cache.header import Header
from geomcache.cache.journal import begin_line
from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import verify
from geomcache.errors import GeomcacheError
from geomcache.geometry import DatasetSpec, GeometrySpec, fingerprint
from tests.faults.common import SHORT, Figure, few_or_many, held_rows
from tests.support.stores import CAMERAS, make_dataset_spec, make_spec, make_store, open_writer

MEMORY = 32 << 20  # bytes that looking at a hostile cache of a few kilobytes may take

WORDS = st.sampled_from(
    ["..", "../../escape", "/etc/passwd", "ray", "episodes", "lock", "NaN", "", "c.0", "\0", "\u202e"]
)
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 2**31, 2**40, 2**63, 10**30]),
    st.floats(allow_nan=False, allow_infinity=False),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text("az/._-0 é\n", max_size=8)),
    lambda children: st.one_of(st.lists(children, max_size=4), st.dictionaries(WORDS, children, max_size=4)),
    max_leaves=8,
)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in JSON."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


def put(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = put(data[path[0]], path[1:], value)
    return copy


def seal_attributes(group: Any) -> bytes:
    """As zarr.json, with a fingerprint that fits where there can be one: what is behind that check is tried too."""
    with contextlib.suppress(GeomcacheError, KeyError, TypeError, AttributeError, ValueError):
        data = group["attributes"]["geomcache"]
        spec, dataset = GeometrySpec.from_dict(data["spec"]), DatasetSpec.from_dict(data["dataset"])
        group = put(group, ("attributes", "geomcache", "fingerprint"), fingerprint(spec, dataset))
    return json.dumps(group).encode()


def seal_journal(records: Any) -> bytes:
    lines = []
    for record in records if isinstance(records, list) else [records]:
        text = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()[:-1]
        lines.append(text + b',"crc32c":"%08x"}\n' % google_crc32c.value(text))
    return b"".join(lines)


def seal_manifest(record: Any) -> bytes:
    text = json.dumps(record).encode()[:-1]
    return text + b',\n"sha256":"%s"\n}\n' % sha256(text).hexdigest().encode()


def load(path: Path, name: str) -> Any:
    content = (path / name).read_bytes()
    if name == "journal.jsonl":
        return [
            {key: value for key, value in json.loads(line).items() if key != "crc32c"} for line in content.splitlines()
        ]
    data = json.loads(content)
    data.pop("sha256", None)
    return data


SEALS = {"zarr.json": seal_attributes, "journal.jsonl": seal_journal, "manifest.json": seal_manifest}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("hostile") / "cache", lengths=SHORT)


@few_or_many("examples", 40, 2000)
@pytest.mark.parametrize("name", SEALS)
def test_malformed_files_are_refused_or_harmless(original: Path, name: str, examples: int, figure: Figure) -> None:
    """One value of a well-formed file is anything, its checksums fit; opened, read and verified."""
    path = shutil.copytree(original, original.with_name(f"{name}-{examples}"))
    if name == "journal.jsonl":
        (path / "manifest.json").unlink()
    good, well_formed = (path / name).read_bytes(), load(path, name)
    everything = places(well_formed)
    outside = {*path.parent.iterdir()}
    results = {"refused": 0, "harmless": 0}
    largest = 0

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck]
    )
    @given(place=st.sampled_from(everything), value=JSON)
    def try_one(place: tuple[Any, ...], value: Any) -> None:
        nonlocal largest
        (path / name).write_bytes(SEALS[name](put(well_formed, place, value)))
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            held_rows(path)
            verify(path)
        except GeomcacheError as error:
            assert "\n" not in str(error)
            results["refused"] += 1
        else:
            results["harmless"] += 1
        largest = max(largest, tracemalloc.get_traced_memory()[1] - before)

    tracemalloc.start()
    try:
        try_one()
    finally:
        tracemalloc.stop()
        (path / name).write_bytes(good)
    assert largest < MEMORY
    assert {*path.parent.iterdir()} == outside
    assert results["refused"] > examples // 4  # many values are free: labels, statistics
    figure(f"{results}, at most {largest >> 10} KiB of memory")


@pytest.mark.parametrize(
    "key", ["..", "../..", "a/b", "/etc", "", ".", ".hidden", "-x", "a\0b", "a\nb", "x" * 300, "lock"]
)
def test_camera_keys_lead_nowhere_else(original: Path, tmp_path: Path, key: str) -> None:
    path = shutil.copytree(original, tmp_path / "inner" / "cache")
    group = load(path, "zarr.json")
    place = ("attributes", "geomcache", "spec", "cameras", 0, "key")
    assert group["attributes"]["geomcache"]["spec"]["cameras"][0]["key"] == CAMERAS[0]
    (path / "zarr.json").write_bytes(seal_attributes(put(group, place, key)))
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    for use in (GeometryStore.open, verify, open_writer):
        with pytest.raises(GeomcacheError):
            use(path)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}


@pytest.mark.parametrize(
    "sizes",
    [{"frames": 1 << 40}, {"frames": 1 << 40, "episodes": 1 << 40}, {"frames": 1 << 62}, {"episodes": 1 << 62}],
)
def test_sizes_that_nobody_has_take_no_memory(original: Path, tmp_path: Path, sizes: dict[str, Any]) -> None:
    path = shutil.copytree(original, tmp_path / "cache")
    (path / "manifest.json").unlink()
    header = Header.read(path)
    files = {name: tuple(entry) for name, entry in load(path, "journal.jsonl")[0]["files"].items()}
    header = replace(header, dataset=replace(header.dataset, **sizes))
    (path / "zarr.json").write_bytes(header.encode())
    (path / "journal.jsonl").write_bytes(begin_line(header.layout, header.fingerprint, files))
    tracemalloc.start()
    try:
        with pytest.raises(GeomcacheError):
            GeometryStore.open(path)
        with contextlib.suppress(GeomcacheError):
            assert verify(path).problems
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def test_a_shard_of_a_hostile_grid_is_refused_by_its_size(tmp_path: Path) -> None:
    """A grid of 9999x9999 promises 1.2 GB a map: the file's size is compared before anything is read."""
    spec = make_spec(grid_hw=(1, 2))
    path = make_store(tmp_path / "cache", spec=spec, lengths=SHORT)
    large = Header.new(make_spec(grid_hw=(9999, 9999)), make_dataset_spec(SHORT))
    commits = load(path, "journal.jsonl")[1:]
    (path / "manifest.json").unlink()
    (path / "zarr.json").write_bytes(large.encode())
    files = {name: tuple(entry) for name, entry in load(path, "journal.jsonl")[0]["files"].items()}
    for commit in commits:
        commit["bytes"] = [low for low, _ in large.layout.size_bounds(16)]
    lines = begin_line(large.layout, large.fingerprint, files) + seal_journal(commits)
    (path / "journal.jsonl").write_bytes(lines)
    tracemalloc.start()
    try:
        assert {problem.shard for problem in verify(path).problems} >= {0, 1}
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def test_a_folder_whose_attributes_nest_too_deep_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_bytes(b"[" * 200_000)
    assert not is_cache(tmp_path)
    with pytest.raises(GeomcacheError):
        GeometryStore.open(tmp_path)
