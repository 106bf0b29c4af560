"""Describe a cache, for people and for scripts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from geomcache.cache.commands import recorded_machines
from geomcache.geometry import OUTPUTS
from geomcache.progress import human_bytes
from geomcache.ranges import format_ranges, rows_of
from geomcache.sharing.address import public_address
from geomcache.sharing.remote_store import open_store


def describe(path: Path | str) -> dict[str, Any]:
    """Return the facts of a cache at a path or an address, as JSON types.

    Raises:
        CacheError: the path has no cache, or the cache is damaged.
    """
    with open_store(path) as store:
        return {
            "path": public_address(str(path)),
            "sealed": store.sealed,
            "encoded_on": [machine._asdict() for machine in recorded_machines(store.path)],
            "fingerprint": store.fingerprint,
            "spec": store.spec.to_dict(),
            "dataset": store.dataset.to_dict(),
            "frames_present": store.frames_present,
            "episodes_present": [list(part) for part in store.episodes()],
            "episodes_missing": [list(part) for part in store.missing_episodes()],
            "shard_frames": store.shard_frames,
            "codec": store.codec,
            "nbytes": store.nbytes,
            "statistics": {
                name: {
                    "channels": list(OUTPUTS[name].channels),
                    "mean": list(moments.mean),
                    "std": list(moments.std),
                    "saturated": moments.saturated,
                }
                for name, moments in store.statistics.items()
            },
        }


def describe_rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the facts of `describe` for people, without the statistics: (name, value).

    An indented name belongs to the one before it.
    """
    spec, dataset = facts["spec"], facts["dataset"]
    state = "sealed" if facts["sealed"] else "not sealed: run the extract command that made it again to resume"
    yield "cache", f"{facts['path']} ({state})"
    yield "fingerprint", facts["fingerprint"]
    yield "model", f"{spec['model_id']} ({spec['model_name']}, {spec['compute_dtype']})"
    yield "  revision", spec["model_revision"] or "local"
    yield "  weights", f"sha256 {spec['weights_sha256']}"
    for machine in facts["encoded_on"]:
        yield "  encoded on", f"{machine['device']}, engine {machine['engine']}"
    if spec["da3_version"]:
        yield "  package", f"depth-anything-3 {spec['da3_version']}"
    size = f"{dataset['frames']} frames, {dataset['episodes']} episodes, {dataset['fps']} fps"
    yield "dataset", f"{dataset['repo_id']}: {size}"
    yield "  revision", dataset["revision"] or "local"
    yield "views", spec["views"]
    for number, camera in enumerate(spec["cameras"]):
        yield f"  view {number}", f"{camera['key']} {camera['height']}x{camera['width']}"
    height, width = spec["grid_hw"]
    yield "grid", f"{height}x{width} ({spec['grid']} at {spec['process_res']} px)"
    yield "outputs", f"{', '.join(spec['outputs'])} as {spec['storage_dtype']}"
    if "feature" in spec:
        yield "  feature", f"{spec['feature']['dim']} of {spec['feature']['width']} numbers a patch"
    yield "frames", f"{facts['frames_present']} present, in shards of {facts['shard_frames']}"
    present, missing = (
        format_ranges(rows_of(facts[name])) or "none" for name in ("episodes_present", "episodes_missing")
    )
    yield "episodes", f"{present} present; {missing} missing"
    yield "bytes", f"{facts['nbytes']} ({human_bytes(facts['nbytes'])}), codec {facts['codec']}"


def describe_lines(facts: dict[str, Any]) -> Iterator[str]:
    """Yield the facts of `describe` as lines, statistics included."""
    for name, value in describe_rows(facts):
        yield f"{name:<13}{value}"
    if facts["statistics"]:
        yield "statistics   channel                mean          std"
    for name, values in facts["statistics"].items():
        for channel, mean, std in zip(values["channels"], values["mean"], values["std"], strict=True):
            yield f"             {channel:<16}{mean:>11.5g}  {std:>11.5g}"
        if values["saturated"]:
            yield f"             {name}: {values['saturated']} values at float16's limit"
