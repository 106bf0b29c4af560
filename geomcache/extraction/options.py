"""The options of stage one: a dataclass for each command, from which the command line and the run.yaml file are made.

Each field is annotated with its option of `geomcache extract` or `geomcache update`: help text, panel, and what is
shown for a default that depends on the machine. A new option is a new field here and nothing else. `--help` imports
this module, which therefore imports neither NumPy nor torch.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from geomcache.errors import UserInputError
from geomcache.sharing.address import check_output, is_remote, public_address

FEATURE = "feature"  # geomcache.geometry's, whose imports `--help` need not wait for

# The panels of `--help`.
_dataset = partial(Option, rich_help_panel="Dataset: which part of it, and where it is")
_geometry = partial(Option, rich_help_panel="Geometry: what the cache's numbers depend on")
_machine = partial(Option, rich_help_panel="Machine: the numbers depend on these by rounding alone")
_cluster = partial(Option, rich_help_panel="Cluster: many machines at once")

DEFAULT_DATASET = "HuggingFaceVLA/libero"  # of the command line
# How one call behaves, not what is in the cache.
NOT_RECORDED = frozenset({"dry_run", "overwrite", "follow", "cluster", "cluster_address", "actors", "gpus_per_actor"})


@dataclass(frozen=True)
class FromText:
    """Marks a field whose type the command line does not know: how to parse what was typed."""

    parse: Callable[[str], object]


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _parse_batch_size(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise UserInputError(f"batch-size: expected a number of frames, or auto, got {text!r}") from None


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """What `geomcache extract` is asked to do.

    Raises:
        UserInputError: a number is out of range, or a list is empty.
    """

    model: Annotated[str, Option(help="A DA3 name such as DA3-LARGE, a Hub id, or a folder.")]
    dataset: Annotated[
        str,
        Option(help="A LeRobotDataset on the Hub; with --root, the name of that folder.", show_default=DEFAULT_DATASET),
    ]
    output: Annotated[
        Path | str | None,
        Option(
            "--output",
            "-o",
            help="The cache: a path, or an address such as s3://bucket/name.zarr.",
            metavar="PATH",
            show_default="the dataset's name + .zarr",
        ),
    ] = None
    dry_run: Annotated[bool, Option("--dry-run", help="Print frames, bytes and time; write nothing.")] = False
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing cache.")] = False
    follow: Annotated[
        bool, Option("--follow", help="Go on until you stop it: extract what is recorded into --root meanwhile.")
    ] = False

    root: Annotated[
        Path | None,
        _dataset(help="The dataset's folder, if it is on this machine.", metavar="DIR"),
    ] = None
    revision: Annotated[str | None, _dataset(help="The dataset's branch, tag or commit.", metavar="REV")] = None
    episodes: Annotated[str | None, _dataset(help="Such as 0:100 or 0,3,5:8.", show_default="all")] = None
    cameras: Annotated[
        tuple[str, ...] | None,
        _dataset(help="Keys in the order of the views; the first is the reference.", show_default="all"),
        FromText(_parse_names),
    ] = None
    tolerance_s: Annotated[
        float, _dataset(help="How far the time stamp of a video's frame may be off, as in lerobot-train.", metavar="S")
    ] = 1e-4

    views: Annotated[
        Literal["joint", "independent"],
        _geometry(help="Encode a frame's cameras as views of one scene, or each camera alone."),
    ] = "joint"
    process_res: Annotated[int, _geometry(help="Longest side of what the network sees, in pixels.")] = 504
    grid: Annotated[str, _geometry(help="patch, native, or cells such as 14x14.")] = "patch"
    outputs: Annotated[
        tuple[str, ...],
        _geometry(help="Any of ray, ray_conf, depth, depth_conf, feature."),
        FromText(_parse_names),
    ] = ("ray", "ray_conf")
    feature_dim: Annotated[
        int | None,
        _geometry(
            help="Numbers a patch of the output feature: a first pass over some frames fits a basis of so many.",
            metavar="D",
            show_default="128",
        ),
    ] = None
    codec: Annotated[
        Literal["raw", "zstd"],
        _geometry(help="How maps are stored. zstd: the same numbers in fewer bytes, slower to read."),
    ] = "raw"
    dtype: Annotated[
        Literal["bf16", "fp32"] | None,
        _geometry(help="Precision of the backbone.", show_default="bf16 on CUDA, fp32 otherwise"),
    ] = None
    model_revision: Annotated[str | None, _geometry(help="The model's branch, tag or commit.", metavar="REV")] = None

    device: Annotated[
        str | None,
        _machine(help="Such as cuda:1 or cpu.", show_default="the GPU if there is one"),
    ] = None
    batch_size: Annotated[
        int | Literal["auto"] | None,
        _machine(
            help="Frames per forward pass, or auto: as many as fit and help.",
            metavar="N|auto",
            show_default="16 on a GPU, 4 on a CPU",
        ),
        FromText(_parse_batch_size),
    ] = None
    engine: Annotated[
        Literal["eager", "compiled"] | None,
        _machine(
            help="Run the network as it is, or compile it first: half a minute, then 1.6 times as fast on a GPU.",
            show_default="compiled for 2 minutes of work and more on a GPU, eager otherwise",
        ),
    ] = None
    num_workers: Annotated[
        int | None,
        _machine(
            help="Decoding processes; on a cluster, decoding tasks for each actor.",
            show_default="the spare cores, up to 8",
        ),
    ] = None

    cluster: Annotated[
        Literal["ray"] | None, _cluster(help="Share the work among the nodes of a Ray cluster.", show_default="none")
    ] = None
    cluster_address: Annotated[
        str, _cluster(help="The cluster: HOST:PORT, auto for the one of this machine, local for a new one here.")
    ] = "auto"
    actors: Annotated[
        int | None,
        _cluster(
            help="Encoders, each an actor that holds the model.",
            metavar="N",
            show_default="as many as the cluster has room for, now and later",
        ),
    ] = None
    gpus_per_actor: Annotated[
        float | None,
        _cluster(help="A fraction lets actors share a GPU.", metavar="N", show_default="1, or 0 with --device cpu"),
    ] = None

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, int) and self.batch_size < 1:
            raise UserInputError(f"batch-size: expected at least 1, or auto, got {self.batch_size}")
        _check_numbers(self.num_workers, self.tolerance_s)
        if self.follow and self.root is None:
            raise UserInputError("follow: expected --root, the folder that is recorded into, got none")
        if self.follow and (self.dry_run or self.overwrite or self.episodes):
            raise UserInputError(
                "follow: expected neither --dry-run, --overwrite nor --episodes, got one: leave it out"
            )
        self._check_address()
        if self.feature_dim is not None and FEATURE not in self.outputs:
            raise UserInputError(
                f"feature-dim: expected the output {FEATURE!r}, got {','.join(self.outputs)}: add it to --outputs, or"
                " leave the option out"
            )
        if self.cameras == ():
            raise UserInputError("cameras: expected at least one key, got none: leave the option out to use all")
        self._check_cluster()

    def _check_address(self) -> None:
        if self.address is None:
            return
        check_output(self.address)
        for unfit, is_asked in (("--follow", self.follow), (f"the output {FEATURE!r}", FEATURE in self.outputs)):
            if is_asked:
                raise UserInputError(
                    f"output: expected a path with {unfit}, got {public_address(self.address)}: extract to a path, then"
                    " `geomcache push`"
                )

    def _check_cluster(self) -> None:
        if self.cluster is None:
            for name in ("actors", "gpus_per_actor"):
                if getattr(self, name) is not None:
                    raise UserInputError(f"{name.replace('_', '-')}: expected --cluster ray with it, got it alone")
            return
        if importlib.util.find_spec("ray") is None:
            raise UserInputError(
                "cluster: expected Ray, it is not installed: install geomcache with it (pip install 'geomcache[ray]')"
            )
        if self.dry_run or self.follow:
            raise UserInputError("cluster: expected neither --dry-run nor --follow with it, got one: leave it out")
        if FEATURE in self.outputs:
            raise UserInputError(
                f"outputs: expected those of DA3's heads with --cluster, got {FEATURE!r}, whose basis one process fits:"
                " leave --cluster out; any number of `geomcache extract` on a shared file system share the work"
            )
        if self.num_workers == 0:
            raise UserInputError("num-workers: expected at least 1 with --cluster, got 0")
        if self.actors is not None and self.actors < 1:
            raise UserInputError(f"actors: expected at least 1, got {self.actors}")
        if self.device not in (None, "cpu"):
            raise UserInputError(f"device: expected cpu or none with --cluster, which chooses GPUs, got {self.device}")
        if self.gpus_per_actor is not None and not 0 < self.gpus_per_actor <= 1:
            raise UserInputError(f"gpus-per-actor: expected more than 0 and at most 1, got {self.gpus_per_actor:g}")
        if self.gpus_per_actor is not None and self.device == "cpu":
            raise UserInputError("gpus-per-actor: expected no --device cpu with it, got both: leave one out")

    @property
    def address(self) -> str | None:
        """The cache's address, perhaps with credentials; None if it has a path."""
        return str(self.output) if is_remote(str(self.output)) else None

    @property
    def output_path(self) -> Path:
        """The cache's path; of a cache at an address, the folder in which its shards are made."""
        if self.address is not None:
            from geomcache.sharing.address_writer import work_folder

            return work_folder(public_address(self.address))
        return Path(self.output or self.dataset.rstrip("/").rpartition("/")[2] + ".zarr")

    @property
    def place(self) -> Path | str:
        """Return what messages call the cache: its path, or its address without credentials."""
        return self.output_path if self.address is None else public_address(self.address).rstrip("/")


@dataclass(frozen=True, kw_only=True)
class UpdateOptions:
    """What `geomcache update` is asked to do. All other settings are those of the cache.

    Raises:
        UserInputError: a number is out of range.
    """

    cache: Annotated[Path, Argument(help="The cache.", metavar="CACHE")]
    dataset: Annotated[
        str | None, Option(help="The dataset as it is now.", show_default="the one that the cache was made of")
    ] = None
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print which rows are kept, moved and encoded, and the time; write nothing.")
    ] = False
    accept_reencoded: Annotated[
        bool,
        Option(
            "--accept-reencoded",
            help="Keep the geometry of episodes whose videos were encoded again; otherwise it is computed anew.",
        ),
    ] = False

    root: Annotated[Path | None, _dataset(help="The dataset's folder, if it is on this machine.", metavar="DIR")] = None
    revision: Annotated[str | None, _dataset(help="The dataset's branch, tag or commit.", metavar="REV")] = None
    episodes: Annotated[
        str | None, _dataset(help="Such as 0:100 or 0,3,5:8.", show_default="all; of a partial cache those that it has")
    ] = None
    tolerance_s: Annotated[
        float, _dataset(help="How far the time stamp of a video's frame may be off, as in lerobot-train.", metavar="S")
    ] = 1e-4

    model: Annotated[
        str | None, _machine(help="Where the cache's DA3 is: a folder or Hub id.", show_default="as in the cache")
    ] = None
    device: Annotated[str | None, _machine(help="Such as cuda:1 or cpu.", show_default="the GPU if there is one")] = (
        None
    )
    batch_size: Annotated[
        int | None,
        _machine(help="Frames per forward pass.", metavar="N", show_default="16 on a GPU, 4 on a CPU"),
    ] = None
    num_workers: Annotated[
        int | None, _machine(help="Decoding processes.", show_default="the spare cores, up to 8")
    ] = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise UserInputError(f"batch-size: expected at least 1, got {self.batch_size}")
        _check_numbers(self.num_workers, self.tolerance_s)


def _check_numbers(num_workers: int | None, tolerance_s: float) -> None:
    if num_workers is not None and num_workers < 0:
        raise UserInputError(f"num-workers: expected at least 0, got {num_workers}")
    if not 0 < tolerance_s < math.inf:
        raise UserInputError(f"tolerance-s: expected a positive number of seconds, got {tolerance_s}")


def recorded_options() -> tuple[str, ...]:
    """Return the names of the options that a run.yaml file may hold, in the order of the fields."""
    return tuple(field.name for field in fields(ExtractOptions) if field.name not in NOT_RECORDED)
