"""The options of an extraction as a file: `extract` writes them beside its cache, and `--config` reads them back.

    model: DA3-LARGE
    dataset: HuggingFaceVLA/libero
    cameras: [observation.images.image, observation.images.image2]
    episodes: 0:100

Keys are the command's options with ``_`` for ``-``. Values are read as text, as the command line has them: YAML itself
takes ``1:30`` for 90, and ``no`` for false. The command line parses them, and has the last word.

What is written says which revisions, cameras and dtype a run took, so that it can be repeated elsewhere and later; what
a machine chooses for itself (device, workers, batch size) only where it was asked for.
"""

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from geomcache.cache import durable, locks
from geomcache.cache.header import LOCK
from geomcache.errors import UserInputError, did_you_mean, one_line

if TYPE_CHECKING:
    from geomcache.extraction.options import ExtractOptions
    from geomcache.geometry import DatasetSpec, GeometrySpec

HEADER = "# Written by `geomcache extract`; `geomcache extract --config` of this file repeats the run.\n"
SUFFIX = ".run.yaml"


def run_config_path(cache: Path) -> Path:
    """Where the options of a cache's last run are: ``libero.zarr`` -> ``libero.run.yaml``, beside it."""
    return cache.with_name(cache.name.removesuffix(".zarr") + SUFFIX)


def read_run_config(file: Path, known: Collection[str]) -> dict[str, str]:
    """Options in a file, as text; lists become what the command line takes, parts with commas between.

    Args:
        file: a YAML mapping.
        known: options that may be in it.

    Raises:
        UserInputError: it cannot be read, is no such mapping, or has an unknown or repeated key or a nested value.
    """
    import yaml

    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserInputError(
            f"config {file}: expected a file that can be read ({error.strerror}): check --config"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserInputError(f"config {file}: expected YAML, found something else: {one_line(error)}") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserInputError(f"config {file}: expected lines such as `model: DA3-LARGE`, found none")
    options: dict[str, str] = {}
    for key, value in root.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else ""
        if name not in known:
            raise UserInputError(
                f"config {file}: {did_you_mean(name, known)}expected options of {', '.join(known)}, got {name!r}"
            )
        if name in options:
            raise UserInputError(f"config {file}: {name}: expected once, found twice: leave one out")
        parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
        texts = [part.value for part in parts if isinstance(part, yaml.ScalarNode) and not part.tag.endswith(":null")]
        if len(texts) != len(parts) or not texts:
            raise UserInputError(
                f"config {file}: {name}: expected a value or a list of values, found none or a nested one: leave the"
                " line out for the default"
            )
        options[name] = ",".join(texts)
    return options


def resolve(options: "ExtractOptions", spec: "GeometrySpec", dataset: "DatasetSpec") -> dict[str, object]:
    """What a run was asked for and what it took where that was left to it, as YAML types, without the defaults."""
    local_model = spec.model_revision is None
    chosen: dict[str, object] = {
        "model": str(Path(options.model).expanduser().absolute()) if local_model else options.model,
        "model_revision": spec.model_revision,
        "dataset": options.dataset,
        "root": options.root and str(options.root.expanduser().absolute()),
        "revision": options.revision if options.root else dataset.revision or options.revision,
        "output": str(options.output_path.absolute()),
        "episodes": options.episodes,
        "cameras": list(spec.camera_keys),
        "views": spec.views,
        "process_res": spec.process_res,
        "grid": spec.grid,
        "outputs": list(spec.outputs),
        "codec": options.codec,
        "dtype": spec.compute_dtype,
        "batch_size": options.batch_size,
        "num_workers": options.num_workers,
        "device": options.device,
    }
    return {name: value for name, value in chosen.items() if value is not None}


def write_run_config(cache: Path, options: dict[str, object]) -> str | None:
    """Write a run's options beside its cache, atomically. A file that a user wrote there stays.

    Returns:
        What the user should know, if anything.
    """
    import yaml

    path = run_config_path(cache)
    content = HEADER.encode() + yaml.safe_dump(options, sort_keys=False, allow_unicode=True, width=10_000).encode()
    # Jobs that share a cache come here at the same time, with the same name for the draft.
    with contextlib.closing(locks.LockFile(cache / LOCK)) as lock, lock.exclusive():
        try:
            there = path.read_bytes()
        except FileNotFoundError:
            there = None
        if there is not None and not there.startswith(HEADER.encode()):
            return f"{path}: not written by geomcache, left as it is; this run's options are not kept"
        if there != content:
            durable.replace_file(path, content)
    return None
