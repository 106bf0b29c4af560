"""Parity: what is in the cache is what the policy encodes, value for value, from a dataset and from the simulator."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from lerobot.datasets import LeRobotDataset

from geomcache.cache.commands import Machine, run_config_path
from geomcache.cache.store import GeometryStore
from geomcache.da3.encoder import DA3Encoder
from geomcache.errors import CacheIncompleteError, CacheMismatchError, GeometryError, ModelError, UserInputError
from geomcache.extraction.differences import DIRECTION, ORIGIN, float16_steps
from geomcache.extraction.options import ExtractOptions
from geomcache.extraction.parity import TOLERANCES, Measure, ParityReport, Steps, choose_rows, parity
from geomcache.extraction.run import extract
from geomcache.frames.reader import FrameReader
from geomcache.geometry import ComputeDtype, Geometry
from geomcache.pipeline.run_file import HEADER
from geomcache.policy.configuration_pi05_geometry import PI05GeometryConfig
from geomcache.policy.modeling_pi05_geometry import PI05GeometryPolicy
from tests.support.cli import call
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
    policy: PI05GeometryPolicy = PI05GeometryPolicy(config).eval()
    return policy


def assert_same(policy: PI05GeometryPolicy, online: Geometry, cached: Geometry) -> None:
    """To one float16 step, and the adapter's tokens to 1e-3 of their length."""
    stored = Geometry(**{name: torch.from_numpy(values) for name, values in cached.items()})
    for (name, computed), (_, expected) in zip(online.items(), stored.items(), strict=True):
        steps = float16_steps(computed.numpy(), expected.numpy())
        assert steps.max() <= 1, name
    with torch.no_grad():
        tokens, expected = (policy.model.geometry_adapter(geometry).embs for geometry in (online, stored))
    assert torch.linalg.vector_norm(expected, dim=-1).min() > 1e-3
    difference = torch.linalg.vector_norm(tokens - expected, dim=-1) / torch.linalg.vector_norm(expected, dim=-1)
    assert difference.max() <= 1e-3


def test_rows_are_chosen_among_those_of_the_cache() -> None:
    def store_of(*ranges: tuple[int, int]) -> GeometryStore:
        present = sum(stop - start for start, stop in ranges)
        return cast("GeometryStore", SimpleNamespace(path=Path("a.zarr"), rows=ranges, frames_present=present))

    store = store_of((3, 6), (10, 11), (20, 24))
    present_rows = [3, 4, 5, 10, 20, 21, 22, 23]
    assert choose_rows(store, 8, 0).tolist() == present_rows
    assert choose_rows(store, 100, 0).tolist() == present_rows
    seen = set()
    for seed in range(40):
        rows = choose_rows(store, 3, seed).tolist()
        assert rows == sorted(set(rows))
        assert len(rows) == 3
        seen.update(rows)
    assert seen == set(present_rows)
    with pytest.raises(CacheIncompleteError, match="found none"):
        choose_rows(store_of(), 1, 0)


# What was measured on one H200 with random weights of DA3-LARGE: benchmarks/RESULTS.md, "How far numbers move".
# Mean and largest of the angles (degrees), of the origins (of their spread) and of the confidences (relative); None
# where it was not measured. "Before": before the rotary tables, and with TF32 in fp32.
Figures = tuple[float, float, float | None, float | None, float | None, float]
ACCEPTED: dict[str, tuple[tuple[ComputeDtype, bool], Figures]] = {
    "fp32, the same batch twice": (("fp32", True), (0, 0, 0, 0, 0, 0)),
    "fp32, eager and compiled": (("fp32", True), (8.25e-5, 0.027, 3.74e-6, 0.00177, 1.91e-7, 0.000785)),
    "fp32, convolutions in TF32, 16 and 1": (("fp32", True), (0.014, 0.15, None, None, None, 0.001)),
    "fp32, GPU and CPU": (("fp32", False), (0.000108, 0.0252, 4.74e-6, 0.00174, 0, 0)),
    "fp32, GPU with TF32 and CPU": (("fp32", False), (0.042, 0.28, None, None, None, 0.0015)),
    "bf16, 16 frames and 1": (("bf16", True), (0.0127, 0.0918, 0.000522, 0.00266, 3.01e-5, 0.000829)),
    "bf16, 16 frames and 5": (("bf16", True), (0.00855, 0.0713, 0.000384, 0.00255, 2.33e-5, 0.000818)),
    "bf16, batch sizes, before": (("bf16", True), (0.014, 0.19, None, None, None, 0.001)),
    "bf16, eager and compiled": (("bf16", True), (0.0776, 1.25, 0.00355, 0.0158, 0.000256, 0.00245)),
    "bf16, eager and compiled, before": (("bf16", True), (0.098, 1.64, None, None, None, 0.004)),
    "bf16, full batch and padded": (("bf16", True), (0.000557, 0.0574, 2.55e-5, 0.00255, 1.55e-6, 0.000794)),
    "bf16 and fp32": (("bf16", False), (0.172, 1.73, 0.00692, 0.0289, 0.000506, 0.00394)),
    "bf16 and fp32, before": (("bf16", False), (0.17, 1.95, None, None, None, 0.005)),
    "bf16 compiled, and fp32": (("bf16", False), (0.172, 1.71, 0.00691, 0.0297, 0.000503, 0.00358)),
    "fp32 on the GPU, bf16 on a CPU": (("bf16", False), (0.151, 1.13, 0.00657, 0.0291, 0.00045, 0.0026)),
    "head in bf16 as well, and fp32": (("bf16", False), (0.41, 3.8, None, None, None, 0.012)),
}
REFUSED: dict[str, Figures] = {
    "the next frame": (8.58, 124, 0.474, 3.89, 0.0306, 0.354),
    "another view order": (24.6, 125, 1.37, 3.93, 0.0717, 0.372),
    "BGR": (17.5, 141, 0.937, 2.94, 0.0434, 0.322),
    "turned by 180 degrees": (22.6, 160, 1.28, 4.38, 0.0712, 0.378),
    "process-res less 14": (10.4, 67.2, 0.696, 3.95, 0.036, 0.217),
    "weights changed by 1%": (1.92, 17.4, 0.0634, 0.234, 0.0045, 0.0276),
}
ANOTHER_REFERENCE: Figures = (0.0748, 1.04, 0.00322, 0.0188, 0.000232, 0.00213)
WEIGHTS_BY_A_THOUSANDTH: Figures = (0.215, 2.09, 0.00733, 0.0279, 0.000607, 0.00488)


def report_of(figures: Figures, dtype: ComputeDtype, *, alike: bool) -> ParityReport:
    """A report of these differences."""
    names = ((DIRECTION, "degrees"), (ORIGIN, "of the spread"), ("ray_conf", "relative"))
    measures = [
        Measure(
            name=name,
            unit=unit,
            mean=figures[2 * number] or 0.0,
            largest=figures[2 * number + 1] or 0.0,
            where="episode 2 frame 7 camera b",
            tolerance=TOLERANCES[dtype, alike][unit],
            neighbours_mean=None,
            neighbours_largest=None,
        )
        for number, (name, unit) in enumerate(names)
    ]
    return ParityReport(
        frames=9, dtype=dtype, device="CPU", cached_on=(), alike=alike, measures=tuple(measures), steps=()
    )


def judge(report: ParityReport) -> dict[tuple[ComputeDtype, bool], bool]:
    """Say for each set of tolerances whether it accepts what the report measured."""
    accepted = {}
    for case, tolerances in TOLERANCES.items():
        measures = tuple(replace(measure, tolerance=tolerances[measure.unit]) for measure in report.measures)
        accepted[case] = not replace(report, measures=measures).problems()
    return accepted


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_was_measured_between_good_caches_is_accepted(name: str) -> None:
    (dtype, alike), figures = ACCEPTED[name]
    report_of(figures, dtype, alike=alike).check()


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_measured_of_faults_is_refused_everywhere(name: str) -> None:
    assert not any(judge(report_of(REFUSED[name], "fp32", alike=True)).values())


def test_small_faults_are_refused_where_rounding_is_smaller() -> None:
    in_fp32 = {("fp32", True): False, ("fp32", False): False, ("bf16", True): True, ("bf16", False): True}
    assert judge(report_of(ANOTHER_REFERENCE, "fp32", alike=True)) == in_fp32
    assert judge(report_of(WEIGHTS_BY_A_THOUSANDTH, "fp32", alike=True)) == {**in_fp32, ("bf16", True): False}


def test_a_report_beyond_its_bound_is_an_error() -> None:
    report = report_of((0.016, 0.3, None, None, 2.5e-4, 0.001), "fp32", alike=True)
    with pytest.raises(
        GeometryError, match=r"ray_conf: .*mean .*0\.0001 relative.*0\.00025.*episode 2 frame 7 camera b"
    ):
        report.check()
    nan = report_of((float("nan"), 0.3, None, None, 0, 0), "bf16", alike=False)
    with pytest.raises(GeometryError, match=f"{DIRECTION}: .*0.5 degrees.*nan"):
        nan.check()
    steps = Steps(output="depth", mean=0.2, largest=3.5, where="episode 0 frame 1 camera a")
    good = replace(report_of((0, 0, 0, 0, 0, 0), "fp32", alike=True), steps=(steps,))
    good.check()
    replace(good, max_steps=3.5).check()
    with pytest.raises(GeometryError, match=r"depth: .*at most 1 float16 steps.*3\.5 in episode 0 frame 1 camera a"):
        replace(good, max_steps=1.0).check()
    assert good.to_dict()["accepted"] is True
    assert json.loads(json.dumps(nan.to_dict()))["accepted"] is False


def test_a_cache_and_its_dataset_agree(cache: Path, dataset: Path) -> None:
    report = parity(cache, 100, root=dataset, device="cpu")
    report.check()
    assert report.frames == 5  # the cache has one of two episodes
    assert (report.dtype, report.device, report.cached_on, report.alike) == ("fp32", "CPU", ("CPU",), True)
    assert [measure.name for measure in report.measures] == [DIRECTION, ORIGIN, "ray_conf", "depth"]
    assert [steps.output for steps in report.steps] == ["ray", "ray_conf", "depth"]
    assert max(steps.largest for steps in report.steps) <= 1
    assert parity(cache, 2, root=dataset, device="cpu").frames == 2
    with pytest.raises(UserInputError, match="at least 1 frame, got 0"):
        parity(cache, 0, root=dataset)


def test_neighbouring_frames_are_compared(cache: Path, dataset: Path) -> None:
    report = parity(cache, 100, root=dataset, device="cpu")
    with GeometryStore.open(cache) as store:
        frames = np.asarray(store.batch([0, 1, 2, 3, 4]).ray_conf, np.float64)
    pairs = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 3)]  # the last frame has none after it
    expected = [np.abs(frames[a] - frames[b]) / np.maximum(frames[a], frames[b]) for a, b in pairs]
    confidence = report.measures[2]
    assert confidence.neighbours_mean == pytest.approx(np.mean(expected))
    assert confidence.neighbours_largest == pytest.approx(np.max(expected))


def test_a_cache_of_one_frame_has_no_neighbours(tmp_path: Path, random_da3_folder: Path) -> None:
    root = tmp_path / "dataset"
    make_dataset(root, (1,), dict.fromkeys(KEYS, (SIZE, SIZE)))
    report = parity(make_cache(root, random_da3_folder), 1, root=root, device="cpu")
    assert {measure.neighbours_mean for measure in report.measures} == {None}
    assert all("nan" not in line for line in report.lines())


def test_a_cache_from_another_machine_is_judged_as_such(
    cache: Path, dataset: Path, tmp_path: Path, random_da3_folder: Path
) -> None:
    moved = tmp_path / "moved.zarr"
    shutil.copytree(cache, moved)
    for record, cached_on in (("", ()), (Machine("NVIDIA H200", "compiled").line, ("NVIDIA H200",))):
        run_config_path(moved).write_text(HEADER + record)
        report = parity(moved, 1, root=dataset, device="cpu", model=str(random_da3_folder))
        assert (report.cached_on, report.alike) == (cached_on, False)
        assert report.measures[0].tolerance == TOLERANCES["fp32", False]["degrees"]


def test_one_value_that_differs_is_found_and_named(cache: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = DA3Encoder.encode

    def changed(self: DA3Encoder, images: Any) -> Geometry:
        geometry = encode(self, images)
        if len(geometry.ray) == 1:  # the fifth frame, in a batch of its own
            assert geometry.depth is not None
            geometry.depth[0, 1, 2, 3] *= 1.02
        return geometry

    monkeypatch.setattr(DA3Encoder, "encode", changed)
    report = parity(cache, 100, root=dataset, device="cpu")
    with pytest.raises(GeometryError, match=r"depth: .*in episode 0 frame 4 camera observation\.images\.image2"):
        report.check()
    depth, steps = report.measures[3], report.steps[2]
    assert depth.largest == pytest.approx(0.02 / 1.02, rel=0.05)
    assert depth.largest / 160 == pytest.approx(depth.mean)  # one of 5 x 2 x 4 x 4 values
    assert 18 < steps.largest < 43  # a fiftieth is 20.5 to 41 steps, as rounded


# Faults, on a CPU with a small model: each changes what `parity` encodes.


def _next_frame(patch: pytest.MonkeyPatch, _model: Path) -> None:
    read = FrameReader.read
    patch.setattr(FrameReader, "read", lambda self, start, _stop: read(self, (start + 1) % 5, (start + 1) % 5 + 1))
    # The pictures' signatures tell it before; here the geometry has to.
    patch.setattr("geomcache.frames.of_cache.check_pictures", lambda *_args, **_options: 0)


def _changed_images(change: Callable[[Sequence[Any]], Sequence[Any]]) -> Callable[[pytest.MonkeyPatch, Path], None]:
    def apply(patch: pytest.MonkeyPatch, _model: Path) -> None:
        encode = DA3Encoder.encode
        patch.setattr(DA3Encoder, "encode", lambda self, images: encode(self, change(images)))

    return apply


def _another_resolution(patch: pytest.MonkeyPatch, model: Path) -> None:
    encode = DA3Encoder.encode

    def smaller(self: DA3Encoder, images: Any) -> Geometry:
        spec = self.spec
        other = DA3Encoder.from_pretrained(
            str(model), cameras=spec.cameras, process_res=42, grid="4x4", outputs=spec.outputs, device="cpu"
        )
        return encode(other, images)

    patch.setattr(DA3Encoder, "encode", smaller)


def _other_weights(patch: pytest.MonkeyPatch, _model: Path) -> None:
    encode = DA3Encoder.encode

    def changed(self: DA3Encoder, images: Any) -> Geometry:
        if self.calls == 0:
            generator = torch.Generator().manual_seed(0)
            for parameter in self._network.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(parameter.data.float() * (1 + 0.01 * noise))
        return encode(self, images)

    patch.setattr(DA3Encoder, "encode", changed)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch, Path], None]] = {
    "the next frame": _next_frame,
    "another view order": _changed_images(lambda images: list(images)[::-1]),
    "another process-res": _another_resolution,
    "weights changed by 1%": _other_weights,
    "BGR": _changed_images(lambda images: [view[..., ::-1] for view in images]),
    "turned by 180 degrees": _changed_images(lambda images: [view[:, ::-1, ::-1] for view in images]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused_by_every_tolerance(
    cache: Path, dataset: Path, random_da3_folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    FAULTS[fault](monkeypatch, random_da3_folder)
    report = parity(cache, 5, root=dataset, device="cpu")
    assert not any(judge(report).values())
    with pytest.raises(GeometryError, match="parity: "):
        report.check()


def test_another_reference_view_is_refused_in_float32(
    cache: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = DA3Encoder.encode

    def swapped(self: DA3Encoder, images: Any) -> Geometry:
        geometry = encode(self, list(images)[::-1])
        return Geometry(**{name: maps.flip(1) for name, maps in geometry.items()})

    monkeypatch.setattr(DA3Encoder, "encode", swapped)
    accepted = judge(parity(cache, 5, root=dataset, device="cpu"))
    assert not accepted["fp32", True]
    assert not accepted["fp32", False]


@pytest.mark.parametrize(("field", "value"), [("reference_view", "middle"), ("weights_sha256", "0" * 64)])
def test_what_rounding_could_hide_is_refused_by_name_before_anything_is_encoded(
    cache: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: str
) -> None:
    def encoded(*_: object) -> None:
        raise AssertionError("images were encoded")

    opened = GeometryStore.open

    def other(path: Path) -> GeometryStore:
        store = opened(path)
        store.spec = replace(store.spec, **{field: value})  # type: ignore[arg-type]
        return store

    monkeypatch.setattr(DA3Encoder, "encode", encoded)
    monkeypatch.setattr(GeometryStore, "open", other)
    with pytest.raises((CacheMismatchError, ModelError), match=value):
        parity(cache, 1, root=dataset, device="cpu")


def test_the_command_prints_json(
    cache: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--parity", "5", "--root", dataset, "--device", "cpu", "--json")
    assert call(monkeypatch, "verify", cache, *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["accepted"] is True
    assert report["steps"][0].keys() == {"output", "mean", "largest", "where"}
    assert report["measures"][0]["tolerance"] == {"mean": 0.02, "largest": 0.5}
    FAULTS["BGR"](monkeypatch, cache)
    assert call(monkeypatch, "verify", cache, *options) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["accepted"] is False
    assert printed.err.count("\n") == 1
    assert DIRECTION in printed.err


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
