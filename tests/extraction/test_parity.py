"""Parity: what is in the cache is what the policy encodes, value for value, from a dataset and from the simulator."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from lerobot.datasets import LeRobotDataset

from geomcache.cache.store import GeometryStore
from geomcache.da3.encoder import DA3Encoder
from geomcache.errors import CacheIncompleteError, GeometryError, UserInputError
from geomcache.extraction.options import ExtractOptions
from geomcache.extraction.parity import OutputParity, ParityReport, choose_rows, float16_steps, parity
from geomcache.extraction.run import extract
from geomcache.geometry import Geometry
from geomcache.policy.configuration_pi05_geometry import PI05GeometryConfig
from geomcache.policy.modeling_pi05_geometry import PI05GeometryPolicy
from tests.support.datasets import make_dataset
from tests.support.simulator import libero_config, needs_simulator, simulator

__all__ = ["libero_config", "simulator"]

KEYS = ("observation.images.image", "observation.images.image2")
SIZE = 64


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes of 5 and 4 frames; its pictures are embedded images, lossless."""
    root = tmp_path_factory.mktemp("parity") / "dataset"
    make_dataset(root, (5, 4), dict.fromkeys(KEYS, (SIZE, SIZE)))
    return root


@pytest.fixture(scope="module")
def cache(dataset: Path, random_da3_folder: Path) -> Path:
    """Its first episode, at 56 px, on the patch grid of 4x4; frames in batches of 2."""
    return make_cache(dataset, random_da3_folder, episodes="0")


def make_cache(dataset: Path, model: Path, *, episodes: str | None = None) -> Path:
    path = dataset.with_suffix(".zarr")
    options = ExtractOptions(
        model=str(model),
        dataset="geomcache/test",
        root=dataset,
        output=path,
        episodes=episodes,
        process_res=56,
        outputs=("ray", "ray_conf", "depth"),
        batch_size=2,
        num_workers=0,
        device="cpu",
    )
    extract(options)
    return path


def make_policy(store: GeometryStore) -> PI05GeometryPolicy:
    """A small policy of this cache; without features, which geometry needs none of."""
    config = PI05GeometryConfig(
        model_size="small", device="cpu", push_to_hub=False, image_resolution=(28, 28), geom_target_hw=(3, 3)
    )
    config.bind_cache(store.spec, store.statistics, store.fingerprint)
    torch.manual_seed(0)
    policy = PI05GeometryPolicy(config)
    policy.eval()
    return policy


def assert_same(policy: PI05GeometryPolicy, online: Geometry, cached: Geometry) -> None:
    """To one float16 step, and the adapter's tokens to 1e-3 of their length."""
    stored = Geometry(**{name: torch.from_numpy(values) for name, values in cached.items()})
    for (name, values), (_, expected) in zip(online.items(), stored.items(), strict=True):
        steps = float16_steps(values.numpy(), expected.numpy())
        assert steps.max() <= 1, name
    with torch.no_grad():
        tokens, expected = (policy.model.geometry_adapter(geometry).embs for geometry in (online, stored))
    assert torch.linalg.vector_norm(expected, dim=-1).min() > 1e-3
    difference = torch.linalg.vector_norm(tokens - expected, dim=-1) / torch.linalg.vector_norm(expected, dim=-1)
    assert difference.max() <= 1e-3


def test_a_float16_step() -> None:
    one = np.float16(1)
    up, down = np.nextafter(one, np.float16(2)), np.nextafter(one, np.float16(0))
    # Below 1 steps are half as long; the step is that at the larger of the two.
    steps = float16_steps(np.array([one, up, one, -one]), np.array([one, one, down, one]))
    np.testing.assert_array_equal(steps, [0, 1, 0.5, 2048])
    values = np.array([3.7, -121.0, 0.013, 65504.0], np.float16)
    below = np.nextafter(values, np.float16(0))
    np.testing.assert_array_equal(float16_steps(values, below), [1, 1, 1, 1])
    # Around zero the step is that at 2^-8, which is 2^-18.
    np.testing.assert_array_equal(float16_steps(np.array([0.0, 2.0**-20]), np.array([2.0**-18, -(2.0**-20)])), [1, 0.5])
    assert np.isnan(float16_steps(np.nan, 1.0))


def test_rows_are_chosen_among_those_that_are_there() -> None:
    def store(*ranges: tuple[int, int]) -> GeometryStore:
        frames = sum(stop - start for start, stop in ranges)
        return cast("GeometryStore", SimpleNamespace(path=Path("a.zarr"), rows=ranges, frames_present=frames))

    partial, present_rows = store((3, 6), (10, 11), (20, 24)), [3, 4, 5, 10, 20, 21, 22, 23]
    assert choose_rows(partial, 8, 0).tolist() == present_rows
    assert choose_rows(partial, 100, 0).tolist() == present_rows
    seen = set()
    for seed in range(40):
        rows = choose_rows(partial, 3, seed).tolist()
        assert rows == sorted(set(rows))
        assert len(rows) == 3
        seen.update(rows)
    assert seen == set(present_rows)
    with pytest.raises(CacheIncompleteError):
        choose_rows(store(), 1, 0)


def test_a_report_beyond_its_bound_is_an_error() -> None:
    near = OutputParity(output="ray", largest=1.0, mean=0.01, frame="episode 0 frame 1 camera a")
    far = OutputParity(output="depth", largest=3.5, mean=0.2, frame="episode 2 frame 7 camera b")
    ParityReport(frames=9, max_steps=1.0, outputs=(near,)).check()
    report = ParityReport(frames=9, max_steps=1.0, outputs=(near, far))
    with pytest.raises(GeometryError, match="depth: expected at most 1 .*found 3.5 in episode 2 frame 7 camera b"):
        report.check()
    broken = OutputParity(output="ray", largest=float("nan"), mean=0.0, frame="")
    with pytest.raises(GeometryError, match="found nan"):
        ParityReport(frames=9, max_steps=1.0, outputs=(broken,)).check()
    assert [line.split() for line in report.lines()][2:] == [["ray", "1", "0.01"], ["depth", "3.5", "0.2"]]


def test_a_cache_and_its_dataset_agree(cache: Path, dataset: Path) -> None:
    report = parity(cache, 100, root=dataset, device="cpu")
    report.check()
    assert report.frames == 5  # the cache has one of two episodes
    assert report.max_steps == 1.0
    assert [found.output for found in report.outputs] == ["ray", "ray_conf", "depth"]
    assert parity(cache, 2, root=dataset, device="cpu").frames == 2
    with pytest.raises(UserInputError, match="at least 1 frame, got 0"):
        parity(cache, 0, root=dataset)


def test_one_value_that_differs_is_found_and_named(cache: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = DA3Encoder.encode

    def changed(self: DA3Encoder, images: Any) -> Geometry:
        geometry = encode(self, images)
        assert geometry.depth is not None
        if len(geometry.ray) == 1:  # the fifth frame, in a batch of its own
            geometry.depth[0, 1, 2, 3] *= 1.01
        return geometry

    monkeypatch.setattr(DA3Encoder, "encode", changed)
    report = parity(cache, 100, root=dataset, device="cpu")
    with pytest.raises(GeometryError, match=r"depth: .*in episode 0 frame 4 camera observation\.images\.image2"):
        report.check()
    depth = report.outputs[2]
    assert depth.largest / 160 == pytest.approx(depth.mean)  # one of 5 x 2 x 4 x 4 values
    assert 5 < depth.largest < 22  # a hundredth is 10.24 to 20.48 steps, as rounded


def test_the_policy_encodes_every_frame_as_the_cache_has_it(cache: Path, dataset: Path) -> None:
    frames = LeRobotDataset("geomcache/test", root=dataset, episodes=[0])
    with GeometryStore.open(cache) as store:
        policy = make_policy(store)
        for item in frames:
            index = int(item["index"])
            batch = {key: item[key][None] for key in KEYS}
            assert batch[KEYS[0]].dtype == torch.float32
            assert_same(policy, policy.geometry_of(batch), store.batch([index]))
        # Another frame's geometry is not the same: the comparison can fail.
        other = store.batch([0])
        assert float16_steps(policy.geometry_of(batch).ray.numpy(), other.ray).max() > 10
    assert policy.online is not None
    assert policy.online.encoder is not None
    assert policy.online.encoder.calls == 6


@pytest.fixture
def live_frames(simulator: None) -> Iterator[list[dict[str, Any]]]:
    """Three observations of LIBERO as LeRobot's evaluation hands them to the policy's preprocessor."""
    import gymnasium
    from lerobot.envs import make_env, make_env_pre_post_processors, preprocess_observation
    from lerobot.envs.configs import LiberoEnv

    config = LiberoEnv(task="libero_object", task_ids=[3], observation_height=SIZE, observation_width=SIZE)
    env = make_env(config, n_envs=1)["libero_object"][3]
    assert isinstance(env, gymnasium.vector.SyncVectorEnv)
    processor, _ = make_env_pre_post_processors(env_cfg=config, policy_cfg=None)
    observation, _ = env.reset(seed=[0])
    down = np.array([[0.5, 0.2, -0.9, 0, 0, 0, 1]], np.float32)
    observations = [observation, *(env.step(down)[0] for _ in range(2))]
    yield [processor(preprocess_observation(found)) for found in observations]
    env.close()


@needs_simulator
def test_the_simulators_frames_recorded_and_live_are_the_same(
    live_frames: list[dict[str, Any]], tmp_path: Path, random_da3_folder: Path
) -> None:
    features: dict[str, Any] = {
        key: {"dtype": "image", "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channel"]} for key in KEYS
    }
    features["observation.state"] = {"dtype": "float32", "shape": (8,), "names": None}
    features["action"] = {"dtype": "float32", "shape": (7,), "names": None}
    root = tmp_path / "recorded"
    recorder = LeRobotDataset.create("geomcache/test", fps=20, features=features, root=root, use_videos=False)
    for frame in live_frames:
        pictures = {key: (frame[key][0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy() for key in KEYS}
        state = frame["observation.state"][0].numpy()
        recorder.add_frame({**pictures, "observation.state": state, "action": np.zeros(7, np.float32), "task": "t"})
    recorder.save_episode()
    recorder.finalize()
    with GeometryStore.open(make_cache(root, random_da3_folder)) as store:
        policy = make_policy(store)
        for index, frame in enumerate(live_frames):
            assert_same(policy, policy.geometry_of(frame), store.batch([index]))
