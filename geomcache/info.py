"""What is in a cache, for people and for scripts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from geomcache.geometry import OUTPUTS
from geomcache.progress import human_bytes
from geomcache.store import GeometryStore


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


def describe_lines(facts: dict[str, Any]) -> Iterator[str]:
    """The same, for people."""
    spec, dataset = facts["spec"], facts["dataset"]
    state = "sealed" if facts["sealed"] else "not sealed: the extract command that made it, given again, continues it"
    yield f"cache        {facts['path']} ({state})"
    yield f"fingerprint  {facts['fingerprint']}"
    yield f"model        {spec['model_id']} ({spec['model_name']}, {spec['compute_dtype']})"
    yield f"  revision   {spec['model_revision'] or 'local'}"
    yield f"  weights    sha256 {spec['weights_sha256']}"
    yield f"  package    depth-anything-3 {spec['da3_version']}"
    size = f"{dataset['frames']} frames, {dataset['episodes']} episodes, {dataset['fps']} fps"
    yield f"dataset      {dataset['repo_id']}: {size}"
    yield f"  revision   {dataset['revision'] or 'local'}"
    yield f"views        {spec['views']}"
    for number, camera in enumerate(spec["cameras"]):
        yield f"  view {number}     {camera['key']} {camera['height']}x{camera['width']}"
    height, width = spec["grid_hw"]
    yield f"grid         {height}x{width} ({spec['grid']} at {spec['process_res']} px)"
    yield f"outputs      {', '.join(spec['outputs'])} as {spec['storage_dtype']}"
    yield f"frames       {facts['frames_present']} there, in shards of {facts['shard_frames']}"
    yield f"episodes     {_ranges(facts['episodes_present'])} there; {_ranges(facts['episodes_missing'])} missing"
    yield f"bytes        {facts['nbytes']} ({human_bytes(facts['nbytes'])})"
    if facts["statistics"]:
        yield "statistics   channel                mean          std"
    for name, values in facts["statistics"].items():
        for channel, mean, std in zip(values["channels"], values["mean"], values["std"], strict=True):
            yield f"             {channel:<16}{mean:>11.5g}  {std:>11.5g}"
        if values["saturated"]:
            yield f"             {name}: {values['saturated']} values at float16's limit"


def _ranges(parts: list[list[int]]) -> str:
    return ",".join(f"{first}:{last}" if last > first + 1 else str(first) for first, last in parts) or "none"
