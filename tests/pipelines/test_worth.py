"""The experiment of `pipelines/worth`: its design, its script, its intervals. `make worth-smoke` runs all of it."""

import itertools
from collections import Counter
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from geomcache.simulator import libero, plus
from geomcache.simulator.camera import CameraMove
from pipelines.worth import design, redundancy, report
from pipelines.worth.frames import Frames
from pipelines.worth.learn import close_eyes
from tests.support.policy import CAMERAS, loss_and_chunk, make_batch, make_policy
from tests.support.simulator import needs_libero, needs_plus


def test_the_closed_loop_begins_where_a_demonstration_began() -> None:
    assert [state for state in range(9) if design.is_held_out(state)] == [2, 5, 8]


@needs_plus
@needs_libero
def test_no_camera_that_is_measured_on_was_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    libero.write_config(libero.find_package())
    trained, unseen = design.cameras()
    assert len({*trained}) == len({*unseen}) == 12
    assert not {*trained} & {*unseen}
    for chosen in (trained, unseen):  # a camera that looks elsewhere is no guess from cameras that stand elsewhere
        kinds = Counter(design.kind(CameraMove.parse(camera)) for camera in chosen)
        assert kinds == {"azimuth": 3, "azimuth, elevation": 3, "distance": 3, "direction": 3}
    names = plus.variant_names("libero_object")
    known = {str(plus.VariantName.parse(name).camera) for name in names if "_view_" in name}
    assert {*trained, *unseen} <= known
    variants = [plus.VariantName.parse(names[number]) for number in design.closed_loop_variants(36, [2, 5])]
    assert {variant.axis for variant in variants} == {"camera"}
    assert {variant.base_task for variant in variants} == {
        libero.task_files("libero_object", task).name for task in (2, 5)
    }
    assert len({variant.name for variant in variants}) == 36
    assert not {str(variant.camera) for variant in variants} & {*trained}


@pytest.mark.parametrize(("every", "each"), [(1, 12), (3, 4), (12, 1)])
def test_demonstrations_take_turns_with_the_cameras(every: int, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, unseen = [f"trained {number}" for number in range(12)], [f"unseen {number}" for number in range(12)]
    states = [SimpleNamespace(initial_state=state) for state in range(15) for _ in range(2)]
    monkeypatch.setattr(design, "cameras", lambda: (trained, unseen))
    monkeypatch.setattr(design, "read_demonstrations", lambda *_: states)
    parts = list(design.parts(Path(), every))
    assert [part.episode for part in parts if part.name.startswith("test_")] == [4, 5, 10, 11, 16, 17, 22, 23, 28, 29]
    seen = [part.cameras for part in parts if part.name.startswith("train_")]
    assert {len(cameras) for cameras in seen} == {each}
    for start in range(len(seen) - every + 1):
        assert sorted(itertools.chain(*seen[start : start + every])) == sorted(trained)
    (measured,) = {part.cameras for part in parts if part.name.startswith("test_")}
    assert [camera for camera in measured if camera in unseen] == unseen[::every]
    assert {*measured} - {*unseen} <= {*seen[0]}
    assert len(measured) == each + min(4, each)


def test_chunks_end_with_their_episode(tmp_path: Path) -> None:
    action = np.arange(5, dtype=np.float32)[:, None].repeat(7, 1)
    np.savez(
        tmp_path / "train_00.npz",
        pictures=np.zeros((5, 2, 4, 4, 3), np.uint8),
        state=np.zeros((5, 8), np.float32),
        action=action,
        length=np.array([3, 2]),
        camera=np.array(["a", "b"]),
        task=np.array("lift"),
    )
    frames = Frames.load([tmp_path / "train_00.npz"], tmp_path, "", (), 3)
    assert frames.actions[..., 0].tolist() == [[0, 1, 2], [1, 2, 2], [2, 2, 2], [3, 4, 4], [4, 4, 4]]
    assert frames.is_pad.sum(1).tolist() == [0, 1, 2, 1, 2]
    assert frames.camera.tolist() == ["a", "a", "a", "b", "b"]


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_a_blind_policy_acts_as_on_black_pictures(kind: str) -> None:
    policy, batch = make_policy(kind=kind), make_batch()
    black = batch | {key: torch.zeros_like(batch[key]) for key in CAMERAS}
    seen, expected = loss_and_chunk(policy, batch)[1], loss_and_chunk(policy, black)[1]
    close_eyes(policy)
    found = loss_and_chunk(policy, batch)[1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(seen, expected, rtol=1e-3, atol=1e-3)


def test_the_interval_draws_each_factor_by_itself() -> None:
    generator = np.random.default_rng(3)
    seeds, demonstrations, cameras = generator.normal(size=(3, 200))
    baseline = np.full((5, 4, 12), 1.0)
    # Only seeds differ: what is drawn of the others changes nothing.
    effect = 0.1 * seeds[:5, None, None] + np.zeros((5, 4, 12))
    found = report.compare("rays", baseline + effect, baseline)
    assert found.difference.mean == pytest.approx(effect.mean())
    means = seeds[generator.integers(5, size=(20000, 5))].mean(1) * 0.1
    assert found.difference.low == pytest.approx(np.quantile(means, 0.025), abs=0.006)
    assert found.difference.high == pytest.approx(np.quantile(means, 0.975), abs=0.006)
    # An effect that is the same everywhere is certain, however much demonstrations and cameras differ.
    varied = 1 + 0.2 * demonstrations[:4, None] ** 2 + 0.2 * cameras[:12] ** 2 + np.zeros((5, 4, 12))
    certain = report.compare("rays", varied - 0.25, varied).difference
    assert (certain.low, certain.mean, certain.high) == pytest.approx((-0.25, -0.25, -0.25))
    assert report.compare("rays", varied, varied).relative.high == 0


def test_a_report_wants_every_pair(tmp_path: Path) -> None:
    folder = tmp_path / "open_loop"
    folder.mkdir()
    header = "arm,seed,steps,camera,seen,demonstration,frames,xyz,gripper"
    for arm, error in (("none", 0.2), ("rays", 0.1)):
        rows = [f"{arm},0,10,{camera},0,{part},5,{error},0.1" for camera in "ab" for part in ("test_00", "test_01")]
        (folder / f"{arm}.0.csv").write_text("\n".join([header, *rows]) + "\n")
    found = report.read(folder)
    values = report.table(found["rays"], [0], "xyz", 0)
    assert values.shape == (1, 2, 2)
    baseline = report.table(found["none"], [0], "xyz", 0)
    assert report.compare("rays", values, baseline).relative.mean == pytest.approx(-0.5)
    lines = (folder / "rays.0.csv").read_text().splitlines()
    (folder / "rays.0.csv").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(SystemExit, match="some are missing"):
        report.table(report.read(folder)["rays"], [0], "xyz", 0)


def test_true_geometry_is_compared_with_geometry_that_knows_nothing() -> None:
    def rows(error: float) -> list[dict[str, str]]:
        return [
            {"seen": "0", "demonstration": part, "camera": camera, "xyz": str(error)}
            for part, camera in product(("test_00", "test_01"), "ab")
        ]

    found = {
        "none": {0: rows(0.2), 1: rows(0.3)},
        "rays": {0: rows(0.12), 1: rows(0.15)},
        "other_rays": {1: rows(0.3)},
        "random_da3": {0: rows(0.16)},  # the second seed is missing, so rays are compared over the first one
        "rays_align": {2: rows(0.1)},  # no seed to compare
        "none_no_hand": {0: rows(0.4)},
        "rays_no_hand": {0: rows(0.3)},
        "other_rays_no_hand": {0: rows(0.5)},
    }
    results = {result.arm: result for result in report.compare_all(found, "xyz", 0)}
    without_hand = ["none_no_hand", "rays_no_hand", "other_rays_no_hand"]
    assert list(results) == ["none", "rays", "other_rays", "random_da3", *without_hand]
    assert results["rays"].relative.mean == pytest.approx(0.135 / 0.25 - 1)
    assert results["rays"].by_seed == pytest.approx((-0.4, -0.5))
    control = results["rays"].against_control
    assert control is not None
    assert control.mean == pytest.approx(0.12 / 0.16 - 1)
    assert results["rays_no_hand"].relative.mean == pytest.approx(0.3 / 0.4 - 1)  # to what sees as little
    control = results["rays_no_hand"].against_control
    assert control is not None
    assert control.mean == pytest.approx(0.3 / 0.5 - 1)
    others = {*results} - {"rays", "rays_no_hand"}
    assert {results[arm].against_control for arm in others} == {None}


def test_what_the_state_says_is_told_from_what_it_does_not_say() -> None:
    generator = np.random.default_rng(5)
    state = np.tile(generator.normal(size=(600, 8)), (3, 1, 1))  # the same motion under three cameras
    place = np.arange(3.0)[:, None, None]
    seen = redundancy.Seen(
        state=state,
        maps={
            "follows": 2 * state[..., :2],  # from the state, whatever the camera
            "moves": 0.1 * state[..., :2] + 5 * place,  # from the state and the camera
            "unknown": np.tile(generator.normal(size=(600, 2)), (3, 1, 1)),
            "still": np.ones((3, 600, 2)),
        },
    )
    found = {name: (alone, together) for name, alone, together in redundancy.rows(seen)}
    assert min(found["follows"][0]) > 0.99
    assert found["follows"][1] > 0.99
    assert min(found["moves"][0]) > 0.99
    assert found["moves"][1] < 0.1
    assert max(found["unknown"][0]) < 0.1
    assert np.isnan(found["still"][1])
