"""The options of stage one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from geomcache.cache.codecs import CodecName
from geomcache.errors import (
    UserInputError,
)
from geomcache.geometry import DEFAULT_OUTPUTS, ComputeDtype, Views


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """What `geomcache extract` is asked for."""

    model: str
    """A DA3 name, a Hub id, or a folder."""
    dataset: str
    """A LeRobotDataset's name."""
    root: Path | None = None
    """Its folder, where it is local."""
    revision: str | None = None
    """Its branch, tag or commit on the Hub."""
    model_revision: str | None = None
    """The model's branch, tag or commit on the Hub."""
    output: Path | None = None
    """The cache; named after the dataset, in the current folder, where None."""
    episodes: str | None = None
    """Such as ``0:100`` or ``0,3,5:8``; all where None."""
    cameras: tuple[str, ...] | None = None
    """Keys in the order of the views; all of the dataset's where None."""
    views: Views = "joint"
    """Whether a frame's cameras are views of one scene."""
    process_res: int = 504
    """Longest side of what the network sees, pixels."""
    grid: str = "patch"
    """``patch``, ``native`` or ``HxW``."""
    outputs: tuple[str, ...] = DEFAULT_OUTPUTS
    """What is cached."""
    codec: CodecName = "raw"
    """How it is stored: as it is, or compressed without loss."""
    batch_size: int | Literal["auto"] | None = None
    """Frames a forward; ``auto`` finds out; 16 on an accelerator and 4 on a CPU where None."""
    num_workers: int | None = None
    """Processes that decode and preprocess; as many as there are cores to spare, at most 8, where None."""
    device: str | None = None
    """Such as ``cuda:1`` or ``cpu``; the process's own accelerator where None."""
    dtype: ComputeDtype | None = None
    """Of the backbone; ``bf16`` on CUDA and ``fp32`` elsewhere where None."""
    dry_run: bool = False
    """Print the plan, write nothing."""
    overwrite: bool = False
    """Replace a cache that is there."""

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, int) and self.batch_size < 1:
            raise UserInputError(f"batch-size: expected at least 1, or auto, got {self.batch_size}")
        if self.num_workers is not None and self.num_workers < 0:
            raise UserInputError(f"num-workers: expected at least 0, got {self.num_workers}")

    @property
    def output_path(self) -> Path:
        """The cache's path."""
        return self.output or Path(self.dataset.rstrip("/").rpartition("/")[2] + ".zarr")
