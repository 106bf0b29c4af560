"""Features in a cache: against upstream's backbone, and everything that a cache promises, basis included."""

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray

import geomcache
from geomcache.cache.inventory import Inventory
from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import verify
from geomcache.da3.encoder import DA3Encoder
from geomcache.da3.feature_basis import FeatureMoments
from geomcache.errors import CacheCorruptError, CacheMismatchError, GeometryError, UserInputError
from geomcache.extraction.feature_pass import fit_feature
from geomcache.extraction.options import ExtractOptions, UpdateOptions
from geomcache.extraction.parity import parity
from geomcache.extraction.run import extract
from geomcache.extraction.update import update
from geomcache.frames.source import open_dataset
from geomcache.geometry import GeometrySpec, fingerprint
from geomcache.sharing.pull import pull
from geomcache.sharing.push import push
from tests.support.da3 import upstream_network
from tests.support.datasets import make_dataset
from tests.support.logs import logged_lines

LENGTHS = (6, 5, 7)
FRAMES = sum(LENGTHS)
CAMERAS = ("observation.images.image", "observation.images.image2")
WIDTH, DIM = 768, 24  # DA3-SMALL gives 384 numbers of each view alone, and 384 of the scene
ROWS = np.arange(FRAMES)
FIT = "geomcache.extraction.feature_pass.fit_feature"


@pytest.fixture(scope="module")
def dataset_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("feature") / "dataset"
    make_dataset(root, LENGTHS, dict.fromkeys(CAMERAS, (48, 64)))  # at 56 px: 42x56, patches 3x4
    return root


@pytest.fixture(scope="module")
def options(random_da3_folder: Path, dataset_root: Path, tmp_path_factory: pytest.TempPathFactory) -> ExtractOptions:
    return ExtractOptions(
        model=str(random_da3_folder),
        dataset="geomcache/test",
        root=dataset_root,
        output=tmp_path_factory.mktemp("reference") / "cache.zarr",
        process_res=56,
        outputs=("ray", "ray_conf", "feature"),
        feature_dim=DIM,
        batch_size=8,
        num_workers=0,
        device="cpu",
    )


@pytest.fixture(scope="module")
def reference(options: ExtractOptions) -> Iterator[GeometryStore]:
    with GeometryStore.open(extract(options).path) as store:
        yield store


def upstream_features(options: ExtractOptions, images: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """What upstream's backbone hands its head of the last layer, for the views of one frame: [V, patches, 768]."""
    from depth_anything_3.utils.io.input_processor import InputProcessor

    network = _network(Path(options.model))
    inputs, _, _ = InputProcessor()(images, process_res=options.process_res)
    taken: list[Any] = []
    hook = network.backbone.register_forward_hook(lambda _module, _args, output: taken.append(output))
    with torch.no_grad():
        network(inputs[None], ref_view_strategy="first")
    hook.remove()
    features: NDArray[np.float32] = taken[0][0][-1][0][0].numpy()
    return features


_network = functools.cache(upstream_network)


def features_at(store: GeometryStore, rows: Iterable[int]) -> NDArray[np.float16]:
    """Cached features [n, V, h, w, D] of rows."""
    features: NDArray[np.float16] | None = store.batch([*rows]).feature
    assert features is not None
    return features


def images_of(options: ExtractOptions, row: int) -> list[NDArray[np.uint8]]:
    dataset, _ = open_dataset("test", root=options.root)
    return [camera[0] for camera in dataset.reader.read(row, row + 1).images]


def test_cached_features_are_upstreams_in_the_numbers_of_the_basis(
    options: ExtractOptions, reference: GeometryStore
) -> None:
    basis = zarr.open_array(options.output_path / "feature_basis", mode="r")[:]
    assert isinstance(basis, np.ndarray)
    assert basis.shape == (WIDTH, DIM)
    np.testing.assert_allclose(basis.T @ basis, np.eye(DIM), atol=1e-5)
    for row in (0, 6, 17):
        features = upstream_features(options, images_of(options, row))
        assert features.shape == (2, 12, WIDTH)
        for view, camera in enumerate(CAMERAS):
            stored = zarr.open_array(options.output_path / camera / "feature", mode="r")[row]
            assert isinstance(stored, np.ndarray)
            assert (stored.dtype, stored.shape) == (np.float16, (3, 4, DIM))
            expected = (features[view].astype(np.float64) @ basis).reshape(3, 4, DIM)  # row by row
            np.testing.assert_allclose(stored, expected, rtol=2.0**-10, atol=2e-3)
            assert np.abs(stored).max() > 0.5  # far more than that


def test_the_basis_loses_least_of_the_squared_length(options: ExtractOptions, reference: GeometryStore) -> None:
    """Against the singular values of all features of the dataset: every frame is in the sample here."""
    features = np.concatenate([upstream_features(options, images_of(options, row)) for row in ROWS.tolist()])
    matrix = features.reshape(-1, WIDTH).astype(np.float64)
    values = np.linalg.svd(matrix, compute_uv=False)
    kept = np.square(features_at(reference, ROWS).astype(np.float64)).sum() / np.square(matrix).sum()
    assert kept == pytest.approx(np.square(values[:DIM]).sum() / np.square(values).sum(), rel=1e-3)


def test_a_grid_coarser_than_the_patches_averages_features(
    options: ExtractOptions, reference: GeometryStore, tmp_path: Path
) -> None:
    path = extract(replace(options, output=tmp_path / "coarse.zarr", grid="1x2")).path
    with GeometryStore.open(path) as store:
        basis, own = (each.feature_basis for each in (store, reference))
        assert basis is not None
        assert own is not None
        features = upstream_features(options, images_of(options, 3)).astype(np.float64) @ basis
        expected = features.reshape(2, 3, 2, 2, DIM).mean(axis=(1, 3))[:, None]  # [V, 1, 2, D]
        np.testing.assert_allclose(features_at(store, [3])[0], expected, rtol=2.0**-10, atol=2e-3)
    for grid in ("native", "4x4"):
        with pytest.raises(UserInputError, match="grid: expected at most 3x4 .*'feature'"):
            extract(replace(options, output=tmp_path / "fine.zarr", grid=grid))
    assert not (tmp_path / "fine.zarr").exists()


def test_the_basis_is_part_of_the_caches_identity(options: ExtractOptions, reference: GeometryStore) -> None:
    feature = reference.spec.feature
    assert feature is not None
    assert (feature.width, feature.dim) == (WIDTH, DIM)
    content = (options.output_path / "feature_basis" / "c.0.0").read_bytes()
    assert feature.basis_sha256 == hashlib.sha256(content[:-4]).hexdigest()
    other = replace(reference.spec, feature=replace(feature, basis_sha256="00" * 32))
    assert (
        fingerprint(other, reference.dataset) != reference.fingerprint == fingerprint(reference.spec, reference.dataset)
    )
    assert "feature_basis/c.0.0" in Inventory.read(options.output_path).files()


def test_whoever_goes_on_takes_the_caches_basis(
    options: ExtractOptions, reference: GeometryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache.zarr"
    extract(replace(options, output=path, episodes="0"))  # another sample than that of all episodes
    with GeometryStore.open(path) as store:
        begun = store.spec
    monkeypatch.setattr(FIT, None)
    extract(replace(options, output=path))
    with GeometryStore.open(path) as store:
        assert store.spec == begun != reference.spec
        basis, others = store.feature_basis, reference.feature_basis
        assert basis is not None
        assert others is not None
        row = FRAMES - 1
        features = upstream_features(options, images_of(options, row)).reshape(2, 3, 4, WIDTH).astype(np.float64)
        np.testing.assert_allclose(features_at(store, [row])[0], features @ basis, rtol=2.0**-10, atol=2e-3)
    assert not verify(path).problems
    with pytest.raises(CacheMismatchError) as caught:
        extract(replace(options, output=path, feature_dim=DIM + 1))
    assert (caught.value.field, caught.value.cached, caught.value.wanted) == ("spec.feature.dim", DIM, DIM + 1)
    with pytest.raises(CacheMismatchError, match=r"spec\.outputs"):
        extract(replace(options, output=path, outputs=("ray", "ray_conf"), feature_dim=None))


def test_two_runs_that_begin_at_once_agree_on_the_basis(
    options: ExtractOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one fits its basis, another one, with fewer episodes, creates the cache."""
    path = tmp_path / "cache.zarr"
    created: list[GeometrySpec] = []

    def slow(*args: Any) -> DA3Encoder:
        fitted = fit_feature(*args)
        monkeypatch.setattr(FIT, fit_feature)
        extract(replace(options, output=path, episodes="0"))
        created.append(GeometryStore.open(path).spec)
        assert fitted.spec != created[0]
        return fitted

    monkeypatch.setattr(FIT, slow)
    extract(replace(options, output=path))
    with GeometryStore.open(path) as store:
        assert [store.spec] == created
        basis, geometry = store.feature_basis, features_at(store, ROWS)
    assert basis is not None
    for row in (0, FRAMES - 1):
        features = upstream_features(options, images_of(options, row)).reshape(2, 3, 4, WIDTH).astype(np.float64)
        np.testing.assert_allclose(geometry[row], features @ basis, rtol=2.0**-10, atol=2e-3)


def test_features_are_encoded_again_to_the_same(options: ExtractOptions, reference: GeometryStore) -> None:
    report = parity(options.output_path, FRAMES, root=options.root, device="cpu")
    report.check()
    measured = {entry.name: entry for entry in report.measures}["feature"]
    assert measured.unit == "degrees"
    assert measured.mean < 0.02
    assert measured.neighbours_mean is not None
    assert measured.neighbours_mean > 1  # another frame's are far off
    assert {steps.output for steps in report.steps} == {"ray", "ray_conf", "feature"}
    with pytest.raises(GeometryError, match="feature basis"):
        DA3Encoder.from_spec(reference.spec, model=options.model, device="cpu")
    basis = reference.feature_basis
    assert basis is not None
    with pytest.raises(GeometryError, match="feature basis"):
        DA3Encoder.from_spec(reference.spec, model=options.model, device="cpu", feature_basis=-basis)


def test_a_dry_run_plans_with_the_size_of_features(options: ExtractOptions, tmp_path: Path) -> None:
    with logged_lines() as lines:
        extract(replace(options, output=tmp_path / "cache.zarr", dry_run=True))
    assert [line for line in lines if re.search(rf"feature +{DIM} of {WIDTH} numbers", line)]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserInputError, match="feature-dim: expected 1 to 768.*got 769"):
        extract(replace(options, output=tmp_path / "cache.zarr", feature_dim=769))
    with pytest.raises(UserInputError, match="feature-dim: expected the output 'feature'"):
        replace(options, outputs=("ray",))
    if importlib.util.find_spec("ray") is not None:
        with pytest.raises(UserInputError, match="outputs: .*--cluster.*'feature'"):
            replace(options, cluster="ray")


def test_a_damaged_basis_is_told(options: ExtractOptions, tmp_path: Path) -> None:
    path = extract(replace(options, output=tmp_path / "cache.zarr", episodes="1")).path
    chunk = path / "feature_basis" / "c.0.0"
    content = bytearray(chunk.read_bytes())
    content[100] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(CacheCorruptError, match=r"feature_basis/c\.0\.0"):
        GeometryStore.open(path)
    assert [problem for problem in verify(path).problems if "feature_basis" in problem.message]


def test_moments_of_two_batches_are_those_of_both() -> None:
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 1, 3, 0.1, 2, 1])
    whole, parts = FeatureMoments(6), FeatureMoments(6)
    whole.add(features)
    parts.add(features[:7])
    parts.add(features[7:])
    basis = whole.basis(3)
    np.testing.assert_allclose(parts.basis(3), basis, atol=1e-5)
    left = np.linalg.svd(features.numpy())[2][:3].T  # right singular vectors, the largest first
    np.testing.assert_allclose(np.abs(basis.T @ left), np.eye(3), atol=1e-4)
    assert (basis[np.abs(basis).argmax(0), range(3)] > 0).all()
    lengths = np.square(features.numpy())
    assert whole.share_kept(basis) == pytest.approx(np.square(features.numpy() @ basis).sum() / lengths.sum(), rel=1e-5)


@pytest.mark.slow
def test_processes_under_accelerate_share_a_basis(options: ExtractOptions, tmp_path: Path) -> None:
    path = tmp_path / "cache.zarr"
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    command = ["-m", "geomcache", "extract", "--model", options.model, "--dataset", "geomcache/test"]
    command += ["--root", str(options.root), "--output", str(path), "--process-res", "56", "--device", "cpu"]
    command += ["--outputs", "ray,ray_conf,feature", "--feature-dim", str(DIM), "--num-workers", "0"]
    done = subprocess.run(
        [sys.executable, *launch, "--mixed_precision", "no", "--dynamo_backend", "no", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("a first pass over") == 1
    assert not verify(path).problems


def test_an_update_carries_features_over_in_the_numbers_of_the_same_basis(
    options: ExtractOptions, reference: GeometryStore, tmp_path: Path
) -> None:
    from lerobot.datasets import LeRobotDataset
    from lerobot.datasets.dataset_tools import delete_episodes

    path = Path(shutil.copytree(reference.path, tmp_path / "cache.zarr"))
    assert options.root is not None
    edited = tmp_path / "edited"
    delete_episodes(LeRobotDataset("geomcache/test", root=options.root), [0], output_dir=edited, repo_id="a/b")
    report = update(
        UpdateOptions(
            cache=path, dataset="a/b", root=edited, model=options.model, device="cpu", num_workers=0, batch_size=8
        )
    )
    assert (report.frames_carried, report.frames_encoded) == (FRAMES - LENGTHS[0], 0)
    with GeometryStore.open(path) as store:
        assert store.spec == reference.spec
        np.testing.assert_array_equal(store.feature_basis, reference.feature_basis)
        kept = features_at(reference, ROWS[LENGTHS[0] :])
        np.testing.assert_array_equal(features_at(store, range(len(kept))), kept)
    assert not verify(path).problems
    reread = parity(path, 2, dataset="a/b", root=edited, model=options.model, device="cpu")
    reread.check()


def test_copies_have_the_basis(options: ExtractOptions, reference: GeometryStore, tmp_path: Path) -> None:
    address = f"file://{tmp_path}/there.zarr"
    push(options.output_path, address)
    pull(address, tmp_path / "whole.zarr")
    pull(address, tmp_path / "part.zarr", episodes="2")
    part = list(range(FRAMES - LENGTHS[2], FRAMES))
    for path, rows in (("whole.zarr", ROWS.tolist()), ("part.zarr", part)):
        with GeometryStore.open(tmp_path / path) as store:
            assert store.fingerprint == reference.fingerprint
            np.testing.assert_array_equal(store.feature_basis, reference.feature_basis)
            np.testing.assert_array_equal(features_at(store, rows), features_at(reference, rows))
        assert not verify(tmp_path / path).problems
    remote = geomcache.open(address)
    np.testing.assert_array_equal(remote.feature_basis, reference.feature_basis)
    np.testing.assert_array_equal(features_at(remote, [3]), features_at(reference, [3]))
