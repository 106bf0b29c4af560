"""The options of an extraction as a file: `extract` writes them next to its cache, and `--config` reads them back.

    model: DA3-LARGE
    dataset: HuggingFaceVLA/libero
    cameras: [observation.images.image, observation.images.image2]
    episodes: 0:100

Keys are the fields of `ExtractOptions`: the command's options with ``_`` for ``-``. Values are read as text, as they
would be typed: YAML itself reads ``1:30`` as 90, and ``no`` as false. The command line parses them, and its own options
win.

What is written says which revisions, cameras and dtype a run used, so that it can be repeated elsewhere and later. What
depends on the machine (device, workers, batch size) is written only if it was given.
"""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from geomcache.cache.commands import extract_settings, recorded_machines, run_config_path
from geomcache.errors import UserInputError, did_you_mean, one_line
from geomcache.extraction.options import ExtractOptions, recorded_options
from geomcache.pipeline.run_file import HEADER, locked_run_config, replace_run_config

if TYPE_CHECKING:
    from geomcache.geometry import DatasetSpec, GeometrySpec

logger = logging.getLogger(__name__)


def read_run_config(file: Path, known: Collection[str]) -> dict[str, str]:
    """Read options from a file, as text; a list becomes what would be typed, its parts joined by commas.

    Args:
        file: a YAML mapping.
        known: names of the options that may be in it.

    Raises:
        UserInputError: it cannot be read, is not a mapping, or has an unknown or repeated key or a nested value.
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


def recorded_run(cache: Path) -> dict[str, str]:
    """Return the options of the run that made a cache, as text; none where they are not recorded next to it.

    Raises:
        UserInputError: the record cannot be read.
    """
    file = run_config_path(cache)
    if not file.is_file() or not file.read_bytes().startswith(HEADER.encode()):
        return {}
    return read_run_config(file, recorded_options())


def resolve(options: ExtractOptions, spec: "GeometrySpec", dataset: "DatasetSpec") -> dict[str, object]:
    """Return the options as YAML types, with what the run chose itself filled in, and without those left to choose."""
    resolved: dict[str, object] = {
        **{name: getattr(options, name) for name in recorded_options()},
        **extract_settings(spec, dataset, options.codec),
        "dataset": options.dataset,
        "model": options.model,
        "output": options.output_path.absolute() if options.address is None else options.place,
    }
    if spec.model_revision is None:  # a folder
        resolved["model"] = Path(options.model).expanduser().absolute()
    if options.root:
        resolved["root"] = options.root.expanduser().absolute()
        resolved["revision"] = options.revision
    else:
        resolved["revision"] = dataset.revision or options.revision
    return {name: _yaml_value(resolved[name]) for name in recorded_options() if resolved[name] is not None}


def _yaml_value(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def write_run_config(cache: Path, options: dict[str, object], *, is_new: bool = False) -> None:
    """Write a run's options next to its cache, atomically. A file that the user wrote there stays, with a warning.

    Args:
        cache: its path.
        options: from `resolve`.
        is_new: whether the cache is empty; otherwise the machines that encoded its frames stay recorded.
    """
    import yaml

    content = yaml.safe_dump(options, sort_keys=False, allow_unicode=True, width=10_000)
    with locked_run_config(cache) as (path, previous):  # jobs that share a cache arrive here at the same time
        machines = () if is_new else recorded_machines(cache)
        if previous is not None and not previous.startswith(HEADER):
            logger.warning("%s: not written by geomcache, left as it is; this run's options are not recorded", path)
        else:
            replace_run_config(path, previous, HEADER + "".join(machine.line for machine in machines) + content)
