"""Augmentation that moves pixels: pictures are LeRobot's own, and maps go where the pixels go."""

from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as v2
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata, StreamingLeRobotDataset
from lerobot.transforms import ImageTransformConfig, ImageTransforms, ImageTransformsConfig
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from geomcache.cache.store import GeometryStore
from geomcache.training import checks
from geomcache.training.dataset import GeometryDataset, with_geometry
from geomcache.training.moved_pictures import (
    PIXELS_MOVE,
    PIXELS_SCALE,
    MovingTransforms,
    homography,
    move_maps,
    moving_transforms,
)
from tests.support.training import CAMERAS, REPO_ID, make_cache, make_dataset, make_spec

SIZE = (96, 128)
RAY, CONF, VALID = (f"observation.geometry.{name}" for name in ("ray", "ray_conf", "valid"))
MOVES: dict[str, dict[str, Any]] = {
    "RandomAffine": {"degrees": [20, 20], "translate": [0.1, 0.1], "scale": [0.8, 1.2], "shear": [5, 5]},
    "RandomRotation": {"degrees": [30, 30]},
    "RandomPerspective": {"distortion_scale": 0.4, "p": 1.0},
    "RandomResizedCrop": {"size": [64, 80], "scale": [0.4, 0.6]},
    "RandomCrop": {"size": [64, 80]},
    "CenterCrop": {"size": [64, 80]},
}
EXPANDING = {"RandomRotation": {"degrees": [30, 30], "expand": True}}


def lerobots(**tfs: tuple[str, dict[str, Any]]) -> ImageTransforms:
    """LeRobot's transforms of these types, all of them, in their order."""
    chosen = {name: ImageTransformConfig(type=kind, kwargs=kwargs) for name, (kind, kwargs) in tfs.items()}
    return ImageTransforms(ImageTransformsConfig(enable=True, max_num_transforms=len(chosen), tfs=chosen))


def applied(transforms: ImageTransforms, picture: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return MovingTransforms(transforms)(picture)


def places(height: int, width: int) -> torch.Tensor:
    """[h, w, 2] float64: the place of each cell's center, in shares of width and height."""
    x, y = (torch.arange(n, dtype=torch.float64).add(0.5) / n for n in (width, height))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def through(matrix: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    moved = torch.cat([points, torch.ones_like(points[..., :1])], -1) @ matrix.T
    return moved[..., :2] / moved[..., 2:]


@pytest.mark.parametrize(
    ("kind", "kwargs"), [*MOVES.items(), *EXPANDING.items()], ids=[*MOVES, "RandomRotation, expanding"]
)
def test_the_homography_is_where_torchvision_takes_its_pixels_from(kind: str, kwargs: dict[str, Any]) -> None:
    """A picture that holds its own places, moved by torchvision bilinearly, tells where each pixel came from."""
    smooth = {} if "Crop" in kind else {"interpolation": v2.InterpolationMode.BILINEAR}
    height, width = SIZE
    own = places(*SIZE)
    picture = torch.stack([own[..., 0], own[..., 1], torch.ones(SIZE, dtype=torch.float64)]).float()
    for seed in range(3):
        moved, matrix = applied(lerobots(x=(kind, kwargs | smooth)), picture, seed)
        inside = moved[2] > 0.9999
        assert 0.2 < inside.float().mean() <= 1.0
        sources = through(matrix, places(*moved.shape[1:]))
        error = (sources - moved[:2].permute(1, 2, 0).double()).abs()[inside] * torch.tensor([width, height])
        # expanding, torchvision rounds the size of the new picture, and centers the old one in it
        assert error.max() < (1.0 if kwargs.get("expand") else 0.01 if "Resized" not in kind else 0.3), f"{error.max()}"
        assert not torch.equal(matrix, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("kind", [*MOVES, "default"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_pictures_are_lerobots_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 256, (3, *SIZE), generator=generator, dtype=torch.uint8)
    picture = picture if dtype == torch.uint8 else picture.float() / 255

    def make() -> ImageTransforms:
        if kind == "default":
            return ImageTransforms(ImageTransformsConfig(enable=True))
        noise: tuple[str, dict[str, Any]] = ("GaussianNoise", {})
        return lerobots(noise=noise, size=("Resize", {"size": [100, 140]}), move=(kind, MOVES[kind]))

    for seed in range(6):
        torch.manual_seed(seed)
        expected = make()(picture)
        assert torch.equal(applied(make(), picture, seed)[0], expected)
        assert torch.rand(1).item() == after(make(), picture, seed)  # and so are all later random numbers


def after(transforms: ImageTransforms, picture: torch.Tensor, seed: int) -> float:
    torch.manual_seed(seed)
    transforms(picture)
    return torch.rand(1).item()


def test_the_kinds_are_torchvisions_and_move_straight_lines() -> None:
    assert set(MOVES) == PIXELS_MOVE
    geometric = {name for name, value in vars(v2).items() if "_geometry" in getattr(value, "__module__", "")}
    assert geometric >= PIXELS_MOVE | PIXELS_SCALE
    assert not PIXELS_MOVE & checks.PIXELS_STAY
    assert PIXELS_SCALE <= checks.PIXELS_STAY


def test_what_does_not_move_is_left_to_lerobot() -> None:
    assert moving_transforms(None) is None
    assert moving_transforms(ImageTransforms(ImageTransformsConfig())) is None
    assert moving_transforms(lerobots(c=("ColorJitter", {}), s=("Resize", {"size": [8, 8]}))) is None
    assert moving_transforms(lambda picture: picture) is None
    assert moving_transforms(ImageTransforms(ImageTransformsConfig(enable=True))) is not None


# Maps


def test_a_homography_by_hand() -> None:
    square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    scaled = homography(square.numpy(), (square * torch.tensor([0.5, 2.0])).numpy())
    assert scaled.flatten().tolist() == pytest.approx([0.5, 0, 0, 0, 2, 0, 0, 0, 1])
    matrix = torch.tensor([[0.9, 0.2, 0.1], [-0.1, 1.1, 0.05], [0.2, -0.1, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(homography(square.numpy(), through(matrix, square).numpy()), matrix)
    assert torch.equal(homography(square.numpy(), square.numpy() + 1e-9), torch.eye(3, dtype=torch.float64))


def frame_maps(views: int = 2, grid: tuple[int, int] = (6, 8)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ray = torch.randn(views, *grid, 6, generator=generator).half()
    return {RAY: ray, CONF: (1 + torch.rand(views, *grid, generator=generator)).half()}


def test_what_was_not_moved_is_equal_to_the_bit() -> None:
    maps = frame_maps()
    still = torch.eye(3, dtype=torch.float64)
    same = move_maps(maps, [still, still])
    assert all(torch.equal(same[key], maps[key]) for key in maps)
    assert same[VALID].all()
    half = move_maps(maps, [still, torch.tensor([[1, 0, 0.5], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)])
    assert torch.equal(half[RAY][0], maps[RAY][0])
    assert not torch.equal(half[RAY][1], maps[RAY][1])
    # Affine by nothing, through torchvision.
    picture = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)
    nothing = lerobots(x=("RandomAffine", {"degrees": [0, 0]}))
    moved, matrix = applied(nothing, picture, 0)
    assert torch.equal(moved, picture)
    assert torch.equal(matrix, still)


def test_a_shift_by_a_cell_takes_the_neighbours_value() -> None:
    maps = frame_maps(views=1)
    left = torch.tensor([[1, 0, 1 / 8], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)  # from one cell to the right
    moved = move_maps(maps, [left])
    torch.testing.assert_close(moved[RAY][0, :, :-1], maps[RAY][0, :, 1:], rtol=2e-3, atol=2e-3)
    assert moved[RAY].dtype == torch.float16
    assert moved[VALID][0].tolist() == [[True] * 7 + [False]] * 6


FOCAL = (1.1, 0.9)


def pinhole(points: torch.Tensor) -> torch.Tensor:
    """Directions of a pinhole camera at places in its picture, [..., 3]; the third is 1."""
    centered = 2 * points - 1
    return torch.cat([centered * torch.tensor(FOCAL), torch.ones_like(points[..., :1])], -1)


@pytest.mark.parametrize("kind", MOVES)
def test_moved_rays_of_a_pinhole_are_the_rays_of_the_moved_picture(kind: str) -> None:
    """A direction is linear in the place: interpolation is exact but at the border, where it is cut off."""
    grid = (24, 32)
    ray = torch.cat([pinhole(places(*grid)), torch.zeros(*grid, 3)], -1).half()[None]
    smooth = {} if "Crop" in kind else {"interpolation": v2.InterpolationMode.BILINEAR}
    picture = pinhole(places(*SIZE)).permute(2, 0, 1).float()  # a picture that shows its own rays
    seen = 0
    for seed in range(4):
        shown, matrix = applied(lerobots(x=(kind, MOVES[kind] | smooth)), picture, seed)
        moved = move_maps({RAY: ray}, [matrix])
        expected = torch.nn.functional.interpolate(shown[None], size=grid, mode="bilinear", antialias=True)[0]
        black = torch.nn.functional.interpolate((shown[2:] - 1).abs()[None], size=grid, mode="area")
        # the average over pixels reaches into the neighbouring cells
        inner = torch.nn.functional.max_pool2d(black, 3, stride=1, padding=1)[0, 0] < 1e-4
        source = through(matrix, places(*grid))
        margin = 1 / torch.tensor([grid[1], grid[0]])
        inner &= ((source > margin) & (source < 1 - margin)).all(-1)
        inner[[0, -1]] = False  # where the average over pixels is cut off
        inner[:, [0, -1]] = False
        error = (moved[RAY][0, ..., :3].float() - expected.permute(1, 2, 0)).abs()[inner]
        assert error.max() < 0.02, error.max()  # a cell is 0.07 wide
        assert moved[VALID][0][inner].all()
        seen += int(inner.sum())
    assert seen > 600


def test_cells_from_outside_of_the_picture_are_marked() -> None:
    """A picture of ones on black: where it is black after the move, no cell has a value."""
    for kind in ("RandomAffine", "RandomRotation", "RandomPerspective"):
        shown, matrix = applied(lerobots(x=(kind, MOVES[kind])), torch.ones(3, *SIZE), 1)
        valid = move_maps(frame_maps(1, SIZE), [matrix])[VALID][0]
        assert 0.02 < (~valid).float().mean() < 0.8
        assert (valid == (shown[0] > 0.5)).float().mean() > 0.985  # edges are rounded to pixels


# Datasets


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> LeRobotDatasetMetadata:
    return make_dataset(tmp_path_factory.mktemp("data") / "pens", (5, 4))


@pytest.fixture(scope="module")
def cache(meta: LeRobotDatasetMetadata, tmp_path_factory: pytest.TempPathFactory) -> GeometryStore:
    """Maps that hold their own places: the first two numbers of a ray are x and y."""
    spec = make_spec(meta, grid_hw=(8, 8))
    own: NDArray[np.float16] = np.zeros((9, 8, 8, 6), np.float16)
    own[..., :2] = places(8, 8).numpy()
    confidence = np.full((9, 8, 8), 2, np.float16)
    maps = {key: {"ray": own, "ray_conf": confidence} for key in CAMERAS}
    return GeometryStore.open(make_cache(tmp_path_factory.mktemp("cache") / "pens.zarr", meta, spec, maps=maps))


def moving() -> ImageTransforms:
    return lerobots(
        colour=("ColorJitter", {"brightness": [0.5, 1.5]}),
        move=("RandomAffine", {"degrees": [-20, 20], "translate": [0.1, 0.1]}),
    )


def test_each_view_moves_by_its_own_draw_and_its_maps_with_it(
    meta: LeRobotDatasetMetadata, cache: GeometryStore
) -> None:
    plain = LeRobotDataset(REPO_ID, root=meta.root, image_transforms=moving())
    torch.manual_seed(3)
    expected = [plain[position] for position in (2, 7)]
    dataset = GeometryDataset(LeRobotDataset(REPO_ID, root=meta.root, image_transforms=moving()), cache)
    torch.manual_seed(3)
    items = dataset.__getitems__([2, 7])
    for item, lerobots_item in zip(items, expected, strict=True):
        for key, value in lerobots_item.items():
            assert item[key] == value if isinstance(value, str) else torch.equal(item[key], value), key
    rays, valid = torch.stack([item[RAY] for item in items]), torch.stack([item[VALID] for item in items])
    centers = rays[:, :, 4, 4, :2].flatten(0, 1)
    assert len({tuple(center.tolist()) for center in centers}) == 4
    assert valid.dtype == torch.bool
    assert not valid.all()
    assert valid.any((2, 3)).all()


def test_batches_of_a_loader_have_the_mask(meta: LeRobotDatasetMetadata, cache: GeometryStore) -> None:
    opened = LeRobotDataset(REPO_ID, root=meta.root, image_transforms=moving())
    batch = next(iter(DataLoader(with_geometry(opened, cache), batch_size=3)))
    assert batch[VALID].shape == (3, 2, 8, 8)
    assert batch[VALID].dtype == torch.bool


def test_streamed_items_move_too(meta: LeRobotDatasetMetadata, cache: GeometryStore) -> None:
    streamed = StreamingLeRobotDataset(
        REPO_ID, root=meta.root, buffer_size=2, max_num_shards=1, image_transforms=moving()
    )
    items = list(with_geometry(streamed, cache))
    assert len(items) == 9
    assert len({tuple(item[RAY][0, 4, 4, :2].tolist()) for item in items}) > 5  # each by its own draw
