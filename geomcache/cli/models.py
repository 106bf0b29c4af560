"""The published DA3 models, what their maps take on disk, and which are on this machine."""

from collections.abc import Iterator
from math import prod
from typing import Any

from geomcache.da3.catalog import CONFIG_FILE, MODELS, WEIGHTS_FILE
from geomcache.geometry import DEFAULT_OUTPUTS, OUTPUTS, PATCH_SIZE, RAYS_PER_PATCH

_SIDE = 504  # pixels of the square view that grids and bytes are of
_PATCHES = _SIDE // PATCH_SIZE
_FLOAT16_NBYTES = 2


def describe_models() -> list[dict[str, Any]]:
    """Return the facts of each published model as JSON types, without asking the Hub."""
    commits = _commits_here()
    grids = {"patch": (_PATCHES, _PATCHES), "native": (_PATCHES * RAYS_PER_PATCH,) * 2}
    channels = sum(len(OUTPUTS[name].channels) for name in DEFAULT_OUTPUTS)
    return [
        {
            "name": model.name,
            "hub_id": model.hub_id,
            "architecture": model.preset,
            "parameters": model.parameters,
            "license": model.license,
            "ray_head": model.ray_head,
            "replaced_by": model.replaced_by,
            "grid_hw": {name: list(cells) for name, cells in grids.items()} if model.ray_head else None,
            "view_nbytes": {name: prod(cells) * channels * _FLOAT16_NBYTES for name, cells in grids.items()}
            if model.ray_head
            else None,
            "commits_here": commits.get(model.hub_id, []),
        }
        for model in MODELS.values()
    ]


def table_lines(facts: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the facts as a table for people."""
    rows = [("model", "parameters", "licence of the weights", "rays", "native grid", "patch", "native", "here")]
    for model in facts:
        grid, nbytes = model["grid_hw"], model["view_nbytes"]
        rows.append(
            (
                model["name"],
                f"{model['parameters'] / 1e6:,.1f} M",
                model["license"],
                "yes" if model["ray_head"] else "no",
                "x".join(map(str, grid["native"])) if grid else "-",
                f"{nbytes['patch']:,}" if nbytes else "-",
                f"{nbytes['native']:,}" if nbytes else "-",
                ", ".join(commit[:7] for commit in model["commits_here"]) or "no",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
    replaced = [f"{model['name']} by {model['replaced_by']}" for model in facts if model["replaced_by"]]
    yield ""
    yield f"patch, native: bytes of ray and ray_conf for one {_SIDE}x{_SIDE} view of a frame, by --grid"
    yield "rays: only models that predict them can be used here"
    yield "here: commits of the model in the Hub's cache on this machine, configuration and weights"
    yield f"upstream recommends others instead of: {', '.join(replaced)}"
    yield "The Hub was not asked: licences are those of upstream's README, and a model's page there can say otherwise."


def _commits_here() -> dict[str, list[str]]:
    """Return, by repository, the commits whose configuration and weights are both in the Hub's local cache."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:  # nothing was ever downloaded
        return {}
    return {
        repository.repo_id: sorted(
            revision.commit_hash
            for revision in repository.revisions
            if {CONFIG_FILE, WEIGHTS_FILE} <= {file.file_name for file in revision.files}
        )
        for repository in repositories
        if repository.repo_type == "model"
    }
