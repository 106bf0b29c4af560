"""What is in a cache, for people and for scripts."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from geomcache.cache.store import GeometryStore
from geomcache.geometry import OUTPUTS
from geomcache.progress import human_bytes


def describe(path: Path) -> dict[str, Any]:
    """Facts of the cache at `path`, as JSON types.

    Raises:
        CacheError: there is none, or it is damaged.
    """
    with GeometryStore.open(path) as store:
        return {
            "path": str(path),
            "sealed": store.sealed,
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
    """The same for people, but for the statistics: (name, value), indented names belong to the one before."""
    spec, dataset = facts["spec"], facts["dataset"]
    state = "sealed" if facts["sealed"] else "not sealed: the extract command that made it, given again, continues it"
    yield "cache", f"{facts['path']} ({state})"
    yield "fingerprint", facts["fingerprint"]
    yield "model", f"{spec['model_id']} ({spec['model_name']}, {spec['compute_dtype']})"
    yield "  revision", spec["model_revision"] or "local"
    yield "  weights", f"sha256 {spec['weights_sha256']}"
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
    yield "frames", f"{facts['frames_present']} there, in shards of {facts['shard_frames']}"
    there, missing = (format_episodes(facts[name]) for name in ("episodes_present", "episodes_missing"))
    yield "episodes", f"{there} there; {missing} missing"
    yield "bytes", f"{facts['nbytes']} ({human_bytes(facts['nbytes'])}), codec {facts['codec']}"


def describe_lines(facts: dict[str, Any]) -> Iterator[str]:
    """The same with the statistics, a line each."""
    for name, value in describe_rows(facts):
        yield f"{name:<13}{value}"
    if facts["statistics"]:
        yield "statistics   channel                mean          std"
    for name, values in facts["statistics"].items():
        for channel, mean, std in zip(values["channels"], values["mean"], values["std"], strict=True):
            yield f"             {channel:<16}{mean:>11.5g}  {std:>11.5g}"
        if values["saturated"]:
            yield f"             {name}: {values['saturated']} values at float16's limit"


def format_episodes(parts: Iterable[Sequence[int]]) -> str:
    """Half-open ranges as ``0:3,7``, the form that `geomcache extract --episodes` takes; ``none``."""
    return ",".join(f"{first}:{last}" if last > first + 1 else str(first) for first, last in parts) or "none"
