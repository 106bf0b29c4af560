"""Cut `libero_object_demo`: the three shortest episodes of a LIBERO recording, with LeRobot's own tools.

    python examples/make_demo_dataset.py ../shared/libero_object_mini examples/libero_object_demo

The video is compressed more than the recording (AV1, crf 34, a key frame every 5 frames), so that it fits into 3 MB.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from lerobot.configs import RGBEncoderConfig
from lerobot.datasets import LeRobotDataset
from lerobot.datasets.dataset_tools import reencode_dataset, split_dataset

EPISODES = 3


def main(source: Path, target: Path) -> None:
    """Cut `source` into `target`, which must not exist."""
    dataset = LeRobotDataset("geomcache/libero_object", root=source, video_backend="pyav")
    lengths = dataset.meta.episodes["length"]
    shortest = sorted(sorted(range(len(lengths)), key=lengths.__getitem__)[:EPISODES])
    with tempfile.TemporaryDirectory() as folder:
        cut = split_dataset(dataset, {"demo": shortest}, output_dir=Path(folder))["demo"]
        reencode_dataset(cut, RGBEncoderConfig(crf=34, g=5))
        shutil.copytree(cut.root, target)
    for path in target.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
