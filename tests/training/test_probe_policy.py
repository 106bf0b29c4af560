"""The linear probe against NumPy, and `probe-policy` on a small checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.datasets import LeRobotDatasetMetadata

from geomcache.cache.store import GeometryStore
from geomcache.errors import UserInputError
from geomcache.training.linear_probe import LinearProbe
from geomcache.training.probe_policy import LEAST_FRAMES, choose_rows, probe_policy
from tests.support.cli import call
from tests.support.training import make_cache, make_dataset, make_spec, options, run_training


def hidden_and_target(seed: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [40, 3, 5] and targets [40, 3, 2] that depend on them linearly, next to a mean of each place."""
    generator = np.random.default_rng(seed)
    hidden = generator.normal(size=(40, 3, 5)) + np.arange(3)[:, None]
    weights = np.arange(10).reshape(5, 2) / 5 - 1
    target = hidden @ weights + 7 * np.arange(6).reshape(3, 2) + noise * generator.normal(size=(40, 3, 2))
    return torch.from_numpy(hidden).float(), torch.from_numpy(target).float()


def test_the_probe_is_ridge_regression() -> None:
    (x, y), (held_x, held_y) = hidden_and_target(0, 1.0), hidden_and_target(1, 1.0)
    probe = LinearProbe(3, 5, 2, ridge=0.05)
    for start in range(0, 40, 16):
        probe.fit(x[start : start + 16], y[start : start + 16])
    probe.solve()
    probe.measure(held_x[:30], held_y[:30])
    probe.measure(held_x[30:], held_y[30:])
    centered_x, centered_y = ((part - part.mean(0)).double().numpy().reshape(120, -1) for part in (x, y))
    # A ridge penalty is one more row of the least squares for each weight.
    penalty = np.sqrt(0.05 * (centered_x**2).sum(0).mean()) * np.eye(5)
    rows = np.concatenate([centered_x, penalty]), np.concatenate([centered_y, np.zeros((5, 2))])
    weights = np.linalg.lstsq(*rows, rcond=None)[0]
    change = (held_y - y.mean(0)).double().numpy()
    error = change - (held_x - x.mean(0)).double().numpy() @ weights
    for channels in (slice(0, 1), slice(0, 2)):
        expected = 1 - (error[..., channels] ** 2).sum() / (change[..., channels] ** 2).sum()
        assert probe.r2(channels) == pytest.approx(expected, rel=1e-5)


def test_what_is_told_exactly_has_one_and_what_is_not_has_none() -> None:
    x, y = hidden_and_target(0, 0.0)
    unrelated = torch.randn(40, 3, 1, generator=torch.Generator().manual_seed(0))
    constant = torch.full((40, 3, 1), 5.0) + torch.arange(3)[:, None]
    target = torch.cat([y, unrelated, constant], -1)
    probe = LinearProbe(3, 5, 4, ridge=1e-9)
    probe.fit(x[:30], target[:30])
    probe.solve()
    probe.measure(x[30:], target[30:])
    assert probe.r2(slice(0, 2)) == pytest.approx(1, abs=1e-6)
    unknown = probe.r2(slice(2, 3))
    assert unknown is not None
    assert unknown < 0.2
    assert probe.r2(slice(3, 4)) is None


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> LeRobotDatasetMetadata:
    return make_dataset(tmp_path_factory.mktemp("data") / "pens", (6, 5, 7, 4))


@pytest.fixture(scope="module")
def cache(meta: LeRobotDatasetMetadata, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(
        tmp_path_factory.mktemp("cache") / "pens.zarr", meta, make_spec(meta, outputs=("ray", "ray_conf", "depth"))
    )


def test_rows_are_of_episodes_apart(cache: Path) -> None:
    with GeometryStore.open(cache) as store:
        fitted, measured = choose_rows(store, 16, 0)
        assert (len(fitted), len(measured)) == (12, 4)
        episodes = [{store.locate(row)[0] for row in rows.tolist()} for rows in (fitted, measured)]
        assert not episodes[0] & episodes[1]
        assert len(episodes[1]) == 1
        assert not np.array_equal(choose_rows(store, 16, 1)[1], measured)
        assert all(np.array_equal(a, b) for a, b in zip(choose_rows(store, 16, 0), (fitted, measured), strict=True))


def test_a_checkpoint_is_probed_layer_by_layer(
    meta: LeRobotDatasetMetadata,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_training(cache, options(meta, tmp_path / "run", "--policy.geom_mode=align", steps=1))
    checkpoint = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    probe = probe_policy(str(checkpoint), cache, root=Path(meta.root), frames=16, batch_size=5, device="cpu")
    assert (probe.fitted, probe.measured, len(probe.layers)) == (12, 4, 5)
    for layer in probe.layers:
        assert set(layer) == {"ray direction", "ray origin", "depth"}
        assert all(value is not None and value <= 1 for value in layer.values())
    assert len({layer["ray origin"] for layer in probe.layers}) == 5
    capsys.readouterr()
    command = ["probe-policy", checkpoint, "--cache", cache, "--root", meta.root, "--frames", 16, "--batch-size", 5]
    assert call(monkeypatch, *command, "--device", "cpu", "--json") == 0
    assert json.loads(capsys.readouterr().out)["layers"] == list(probe.layers)
    assert call(monkeypatch, *command, "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-6:-1]] == ["0", "1", "2", "3", "4"]
    for bad, named in ((["--frames", 7], str(LEAST_FRAMES)), (["--batch-size", 0], "batch-size")):
        assert call(monkeypatch, *command, *bad) == 2
        assert named in capsys.readouterr().err


def test_one_episode_is_not_enough(tmp_path: Path) -> None:
    meta = make_dataset(tmp_path / "pens", (12,))
    cache = make_cache(tmp_path / "pens.zarr", meta, make_spec(meta))
    with pytest.raises(UserInputError, match="at least 2 episodes"):
        probe_policy("nowhere", cache, root=Path(meta.root), frames=8)
