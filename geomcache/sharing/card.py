"""What is published of a cache besides its arrays: the labels in ``zarr.json``, and the card that the Hub shows."""

import dataclasses
import json
import re
import shlex
from pathlib import Path, PureWindowsPath

from geomcache.cache.header import Header
from geomcache.cache.store import GeometryStore
from geomcache.da3.catalog import MODELS, published
from geomcache.geometry import DA3, GeometrySpec
from geomcache.progress import human_bytes
from geomcache.ranges import format_ranges, rows_of

_HUB_LICENSES = {"Apache-2.0": "apache-2.0", "CC BY-NC 4.0": "cc-by-nc-4.0"}  # the Hub's names of them
_LOCAL = "unknown: a local folder"

_TEXT = """\
---
{front}
---

# {title}

The geometry that [Depth Anything 3](https://github.com/ByteDance-Seed/Depth-Anything-3) predicts for every frame of a
LeRobot dataset, computed once and stored as a Zarr v3 cache that geomcache trains Pi0.5 from.

| | |
| --- | --- |
{rows}

## Train from it

```bash
{train} \\
  --policy.pretrained_path=lerobot/pi05_libero_base --policy.dtype=bfloat16 --policy.gradient_checkpointing=true \\
  --steps=2000 --batch_size=8 --output_dir=outputs/pi05_geometry
```

This downloads the cache first and compares every file with its sha256. To choose where the copy lies, or to download a
part with `--episodes 0:10`:

```bash
{pull}
```
"""


def published_header(header: Header) -> Header:
    """Return the header with labels that tell nothing of this machine: of a path, its last name alone.

    Labels are no part of the fingerprint. A model or dataset that was given as a folder has its path as a label.
    """
    spec = dataclasses.replace(header.spec, model_id=_published_label(header.spec.model_id))
    dataset = dataclasses.replace(header.dataset, repo_id=_published_label(header.dataset.repo_id))
    return dataclasses.replace(header, spec=spec, dataset=dataset)


def _published_label(label: str) -> str:
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", label):  # a published name, or an id of the Hub
        return label
    return PureWindowsPath(label).name or "local"  # takes both / and \ for separators


def write_card(path: Path, address: str, header: Header) -> str:
    """Return the card of the cache at `path`, which can be pulled from `address`; the header is the published one.

    Raises:
        CacheError: the cache cannot be opened.
    """
    spec, dataset = header.spec, header.dataset
    with GeometryStore.open(path) as store:
        episodes = store.episodes()
    license_name, license_text = _license(spec)
    title = f"{spec.model_id} geometry of {dataset.repo_id}"
    front = {
        "pretty_name": title,
        "tags": ["geomcache", "LeRobot", "robotics", "depth-anything-3", "zarr"],
        "viewer": False,
    }
    if license_name is not None:
        front["license"] = _HUB_LICENSES[license_name]
    train = ["geomcache", "train", "--cache", address, f"--dataset.repo_id={dataset.repo_id}"]
    if dataset.revision is not None:
        train.append(f"--dataset.revision={dataset.revision}")
    rows = {
        "model": f"{spec.model_id} ({spec.model_name}, {spec.compute_dtype}), revision {spec.model_revision or _LOCAL}",
        "weights": f"sha256 `{spec.weights_sha256}`",
        "licence of the weights": license_text,
        "dataset": f"{dataset.repo_id}, revision {dataset.revision or _LOCAL}; its own licence applies as well",
        "frames": f"{store.frames_present} of {dataset.frames}, at {dataset.fps} fps",
        "episodes": f"{format_ranges(rows_of(episodes)) if episodes else 'none complete'} of {dataset.episodes}",
        "cameras": ", ".join(f"{camera.key} ({camera.height}x{camera.width})" for camera in spec.cameras),
        "maps": f"{', '.join(spec.outputs)}, {spec.grid_hw[0]}x{spec.grid_hw[1]} cells a view, {spec.storage_dtype},"
        f" {spec.views} views",
        "size": human_bytes(store.nbytes),
        "fingerprint": f"`{store.fingerprint}`",
    }
    return _TEXT.format(
        front="\n".join(f"{name}: {json.dumps(value)}" for name, value in front.items()),  # JSON is YAML, and quotes
        title=title,
        rows="\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items()),
        train=shlex.join(train),
        pull=shlex.join(["geomcache", "pull", address, "cache.zarr"]),
    )


def _license(spec: GeometrySpec) -> tuple[str | None, str]:
    """Return the name of the weights' licence, None where it is unknown, and what the card says of it."""
    if spec.source != DA3:
        return None, f"there are no weights: geometry of {spec.source}"
    model = published(spec.model_id)
    if model is not None and spec.model_revision is not None:
        return model.license, f"{model.license}, as upstream's README says"
    of_preset = sorted({each.license for each in MODELS.values() if each.preset == spec.model_name})
    return None, (
        f"unknown: the weights did not come from upstream's own repository; upstream's {spec.model_name} is under"
        f" {' or '.join(of_preset) or 'no known licence'}"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
