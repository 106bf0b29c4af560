"""Small datasets and caches for the tests of stage two: what a row holds tells which row it is."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from numpy.typing import NDArray

from geomcache.cache.layout import SCHEMA_VERSION
from geomcache.cache.signatures import Signatures
from geomcache.cache.writer import StoreWriter
from geomcache.frames.signature import sign_pictures
from geomcache.frames.source import describe_dataset, episode_identities, episode_lengths, open_dataset
from geomcache.geometry import OUTPUTS, Camera, GeometrySpec
from geomcache.training import trainer as training

# 2.4 million parameters, pictures of 2x2 patches
SMALL_POLICY = (
    "--policy.model_size=small",
    "--policy.image_resolution=[28,28]",
    "--policy.max_state_dim=2",
    "--policy.max_action_dim=2",
    "--policy.chunk_size=3",
    "--policy.n_action_steps=3",
    "--policy.num_inference_steps=2",
    "--policy.tokenizer_max_length=64",
    "--policy.geom_target_hw=[2,2]",
    "--policy.device=cpu",
)
CAMERAS = ("observation.images.image", "observation.images.image2")
REPO_ID = "tests/pens"


def make_dataset(
    root: Path,
    lengths: Sequence[int] = (5, 4, 6),
    *,
    size: int = 16,
    cameras: Sequence[str] = CAMERAS,
    actions: NDArray[np.float32] | None = None,
    seed: int = 0,
) -> LeRobotDatasetMetadata:
    """Write a dataset with embedded images of noise.

    ``observation.state`` and ``action`` are (index, frame); where actions [N, 2] are given, the state tells nothing.
    """
    features = {
        key: {"dtype": "image", "shape": (size, size, 3), "names": ["height", "width", "channels"]} for key in cameras
    }
    features["observation.state"] = {"dtype": "float32", "shape": (2,), "names": ["index", "frame"]}
    features["action"] = {"dtype": "float32", "shape": (2,), "names": ["index", "frame"]}
    dataset = LeRobotDataset.create(REPO_ID, fps=10, features=features, root=root, use_videos=False)
    generator = np.random.default_rng(seed)
    index = 0
    for length in lengths:
        for frame in range(length):
            place = np.array([index, frame], dtype=np.float32)
            action, state = (
                (place, place) if actions is None else (actions[index], generator.random(2, dtype=np.float32))
            )
            pictures = {key: generator.integers(0, 256, (size, size, 3), dtype=np.uint8) for key in cameras}
            dataset.add_frame({**pictures, "observation.state": state, "action": action, "task": "pick up the pen"})
            index += 1
        dataset.save_episode()
    dataset.finalize()
    return LeRobotDatasetMetadata(REPO_ID, root=root)


def make_spec(
    meta: LeRobotDatasetMetadata,
    *,
    grid_hw: tuple[int, int] = (4, 4),
    outputs: tuple[str, ...] = ("ray", "ray_conf"),
    cameras: Sequence[str] = CAMERAS,
) -> GeometrySpec:
    """A spec that names a model nobody has."""
    return GeometrySpec(
        model_id="made-up",
        model_revision=None,
        model_name="da3-small",
        weights_sha256="00" * 32,
        da3_version="0.1.1",
        views="joint",
        cameras=tuple(Camera(key=key, height=meta.shapes[key][0], width=meta.shapes[key][1]) for key in cameras),
        process_res=56,
        grid=f"{grid_hw[0]}x{grid_hw[1]}",
        grid_hw=grid_hw,
        outputs=outputs,
        compute_dtype="fp32",
    )


def row_maps(spec: GeometrySpec, indices: NDArray[np.int64]) -> dict[str, dict[str, NDArray[np.float16]]]:
    """Maps [n, h, w(, 6)] of these rows: every value is a whole number that tells row, camera, output and channel."""
    maps: dict[str, dict[str, NDArray[np.float16]]] = {}
    for view, camera in enumerate(spec.camera_keys):
        maps[camera] = {}
        for number, output in enumerate(spec.outputs):
            values = np.zeros((len(indices), *spec.map_shape(output)), dtype=np.float16)
            values += (1 + number + 512 * view) + 8 * indices.reshape(-1, *[1] * (values.ndim - 1))
            if OUTPUTS[output].trailing:
                values += np.arange(6, dtype=np.float16)
            maps[camera][output] = values
    return maps


def sign_dataset(meta: LeRobotDatasetMetadata, spec: GeometrySpec) -> Signatures:
    """The signatures of every frame of a dataset in a folder."""
    opened, _ = open_dataset(REPO_ID, root=Path(meta.root), cameras=spec.camera_keys)
    return sign_pictures(opened.reader.read(0, opened.spec.frames).images)


def make_cache(
    path: Path,
    meta: LeRobotDatasetMetadata,
    spec: GeometrySpec,
    *,
    episodes: Sequence[int] | None = None,
    maps: dict[str, dict[str, NDArray[np.float16]]] | None = None,
    seal: bool = True,
    schema_version: int = SCHEMA_VERSION,
) -> Path:
    """A cache of these episodes (all where None) that holds `row_maps`, or these maps of all rows."""
    lengths = episode_lengths(meta)
    starts = np.cumsum(lengths) - lengths
    wanted = [
        (int(starts[e]), int(starts[e] + lengths[e])) for e in (range(len(lengths)) if episodes is None else episodes)
    ]
    signatures = sign_dataset(meta, spec)
    every = row_maps(spec, np.arange(meta.total_frames)) if maps is None else maps
    dataset = describe_dataset(meta, spec.camera_keys, schema_version=schema_version)
    identities = episode_identities(meta, spec.camera_keys)
    with StoreWriter.create_or_open(path, spec, dataset, lengths, wanted, identities=identities) as writer:
        while (claim := writer.claim()) is not None:
            rows = np.concatenate([np.arange(start, stop) for start, stop in claim.rows])
            part = {camera: {name: values[rows] for name, values in of.items()} for camera, of in every.items()}
            writer.commit(claim, part, signatures[rows])
        if seal:
            assert writer.seal()
    return path


def options(meta: LeRobotDatasetMetadata, output: Path, *more: str, steps: int = 2) -> list[str]:
    """A command line for a small run; later options win."""
    run = [f"--dataset.repo_id={REPO_ID}", f"--dataset.root={meta.root}", "--dataset.use_imagenet_stats=false"]
    run += [f"--output_dir={output}", f"--steps={steps}", "--batch_size=2", "--num_workers=0", "--log_freq=1"]
    return [*run, *SMALL_POLICY, *more]


@dataclass(frozen=True)
class Step:
    """One step of LeRobot's trainer."""

    loss: float
    batch: dict[str, Any]
    """Batch that the policy was given."""
    metrics: dict[str, float]
    """Numbers that the trainer logs, by name."""
    shown: str
    """The log line."""


def run_training(cache: Path, args: Sequence[str]) -> list[Step]:
    """Run `train` and record each step. LeRobot takes over the root logger; its handlers are restored."""
    from lerobot.scripts import lerobot_train

    steps = []
    update = lerobot_train.update_policy

    def watched(tracker: Any, policy: Any, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = update(tracker, policy, batch, *args, **kwargs)
        steps.append(Step(loss=tracker.loss.val, batch=batch, metrics=tracker.to_dict(), shown=str(tracker)))
        return result

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        with mock.patch.object(lerobot_train, "update_policy", watched):
            training.train(cache, args)
    finally:
        root.handlers[:], root.level = handlers, level
    return steps
