"""Read recordings once, and keep their frames in memory: LeRobot's loader decodes each item anew.

    python pipelines/worth/frames.py --recorded DIR --name train_03 --cameras 45_0_100_0_0,... --output DIR

Legend of shapes:  N frames   V views   h, w grid   H, W picture   K actions of a chunk
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geomcache.cache.store import GeometryStore
from geomcache.frames.source import open_dataset
from geomcache.geometry import Geometry
from geomcache.simulator.record import ACTION, STATE

SOURCES = {"oracle": "zarr", "da3": "da3.zarr"}  # endings of the caches next to a recording


def cache_of(caches: Path, name: str, source: str) -> Path:
    """Return the path of the cache of a recording."""
    return caches / f"{name}.{SOURCES[source]}"


def gather(recorded: Path, name: str, cameras: Sequence[str], output: Path) -> None:
    """Write all arrays of a recording into one file, which appears whole."""
    from lerobot.datasets import LeRobotDataset

    root = recorded / name
    dataset, _ = open_dataset(f"geomcache/{name}", root=root)
    lengths = np.asarray(dataset.reader.episode_length)
    table = LeRobotDataset(f"geomcache/{name}", root=root, download_videos=False).hf_dataset.with_format("numpy")
    assert len(lengths) == len(cameras)
    arrays: dict[str, Any] = {
        "pictures": np.stack(dataset.reader.read(0, int(lengths.sum())).images, axis=1),  # [N, V, H, W, 3]
        "state": np.stack(table[STATE]).astype(np.float32),
        "action": np.stack(table[ACTION]).astype(np.float32),
        "length": lengths,  # [episodes]
        "camera": np.array(cameras),  # [episodes]
        "task": np.array(dataset_task(root, name)),
    }
    draft = output / f"{name}.draft.npz"
    np.savez(draft, **arrays)
    draft.rename(output / f"{name}.npz")


def dataset_task(root: Path, name: str) -> str:
    """Return the words of the one task of a recording."""
    from lerobot.datasets import LeRobotDatasetMetadata

    (task,) = LeRobotDatasetMetadata(f"geomcache/{name}", root=root).tasks.index
    return str(task)


@dataclass(frozen=True, kw_only=True)
class Frames:
    """The frames of several recordings."""

    pictures: Tensor  # [N, V, 3, H, W] uint8
    maps: dict[str, Tensor]  # of each output, [N, V, h, w, ...] float16; empty without geometry
    state: NDArray[np.float32]  # [N, 8]
    actions: NDArray[np.float32]  # [N, K, 7], the last one repeated at the end of an episode
    is_pad: NDArray[np.bool_]  # [N, K]
    tasks: tuple[str, ...]  # of each frame
    part: NDArray[np.str_]  # [N] name of the recording
    camera: NDArray[np.str_]  # [N]

    @classmethod
    def load(
        cls, files: Sequence[Path], caches: Path, source: str, outputs: Sequence[str], chunk: int, every: int = 1
    ) -> "Frames":
        """Read one of so many frames of files that `gather` wrote, and their maps from the caches.

        `source` is empty for no geometry.
        """
        pictures, maps, state, actions, pads, tasks, parts, cameras = [], [], [], [], [], [], [], []
        for file in files:
            content = np.load(file)
            lengths = content["length"]
            chosen = np.arange(lengths.sum())[::every]
            pictures.append(torch.from_numpy(content["pictures"][::every]).permute(0, 1, 4, 2, 3))
            if source:
                with GeometryStore.open(cache_of(caches, file.stem, source)) as store:
                    found = dict(store.batch(chosen).items())
                maps.append([torch.from_numpy(found[output]) for output in outputs])
            state.append(content["state"][::every])
            ends = np.repeat(np.cumsum(lengths), lengths)[chosen]  # [N] row after the episode
            rows = chosen[:, None] + np.arange(chunk)
            pads.append(rows >= ends[:, None])
            actions.append(content["action"][np.minimum(rows, ends[:, None] - 1)])
            tasks += [str(content["task"])] * len(chosen)
            parts.append(np.repeat(file.stem, len(chosen)))
            cameras.append(np.repeat(content["camera"], lengths)[chosen])
        return cls(
            pictures=torch.cat(pictures),
            maps={output: torch.cat([each[place] for each in maps]) for place, output in enumerate(outputs) if source},
            state=np.concatenate(state),
            actions=np.concatenate(actions),
            is_pad=np.concatenate(pads),
            tasks=tuple(tasks),
            part=np.concatenate(parts),
            camera=np.concatenate(cameras),
        )

    def __len__(self) -> int:
        return len(self.state)

    def to(self, device: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Return pictures and maps on a device."""
        return self.pictures.to(device), {output: values.to(device) for output, values in self.maps.items()}


def geometry_keys(maps: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Return the maps of these rows as entries of a batch."""
    return dict(Geometry(**{output: values[rows] for output, values in maps.items()}).to_batch()) if maps else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recorded", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--cameras", required=True, help="of the recording's episodes, separated by commas")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    gather(arguments.recorded, arguments.name, arguments.cameras.split(","), arguments.output)


if __name__ == "__main__":
    main()
