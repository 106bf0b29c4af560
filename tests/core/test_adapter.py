"""GeometryTokenAdapter against values worked out by hand and a resampler written here."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from geomcache.adapter import ABSOLUTE_STD_FLOOR, RELATIVE_STD_FLOOR, GeometryTokenAdapter
from geomcache.geometry import HEAD_OUTPUTS, Geometry
from geomcache.statistics import Moments
from tests.support.geometry import example_geometry


def moments(mean: list[float], std: list[float]) -> Moments:
    return Moments(count=10, mean=tuple(mean), m2=tuple(10 * s * s for s in std), saturated=0)


PLAIN = {"ray": moments([0.0] * 6, [1.0] * 6), "ray_conf": moments([0.0], [1.0])}


def make_adapter(statistics: Mapping[str, Moments] = PLAIN, **options: Any) -> GeometryTokenAdapter:
    """With a projection that copies channel c to output c, so that tokens show the channels."""
    defaults: dict[str, Any] = {
        "views": 1,
        "target_hw": (2, 2),
        "init_alpha": 1.0,
        "attention": "full",
        "modality_embedding": False,
    }
    channels = sum(len(m.mean) for m in statistics.values())
    adapter = GeometryTokenAdapter(statistics=statistics, width=channels, **(defaults | options))
    with torch.no_grad():
        adapter.projection.weight.copy_(torch.eye(channels))
        adapter.projection.bias.zero_()
    return adapter


def example(views: int = 2, grid_hw: tuple[int, int] = (5, 6), outputs: tuple[str, ...] = HEAD_OUTPUTS) -> Geometry:
    made = example_geometry(batch=3, views=views, grid_hw=grid_hw, outputs=outputs)
    return Geometry(**{name: torch.from_numpy(values) for name, values in made.items()})


def triangle_weights(size: int, target: int) -> NDArray[np.float64]:
    """[target, size]: a triangle as wide as a target cell, at least as wide as a source cell, cut at the border."""
    scale = size / target
    width = max(scale, 1.0)
    centers = (np.arange(target) + 0.5) * scale
    distance = np.abs(np.arange(size)[None] + 0.5 - centers[:, None]) / width
    weights = np.clip(1.0 - distance, 0.0, None)
    normalised: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return normalised


def test_four_cells_become_one_by_hand() -> None:
    adapter = make_adapter({"ray": moments([1.0] + [0.0] * 5, [2.0] + [1.0] * 5)}, target_hw=(1, 1))
    ray = torch.zeros(1, 1, 1, 4, 6)
    ray[0, 0, 0, :, 0] = torch.tensor([1.0, 3.0, 5.0, 9.0])  # standardised: 0, 1, 2, 4
    ray[0, 0, 0, :, 1] = torch.tensor([8.0, 0.0, 0.0, 0.0])
    tokens = adapter(Geometry(ray=ray)).embs
    # Centre 2, width 4: weights 5/8, 7/8, 7/8, 5/8 over 3. Without antialiasing the outer cells would count nothing.
    assert tokens.shape == (1, 1, 6)
    expected = [(0 * 5 + 1 * 7 + 2 * 7 + 4 * 5) / 24, 8 * 5 / 24, 0, 0, 0, 0]
    np.testing.assert_allclose(tokens[0, 0].tolist(), expected, rtol=1e-6)


def test_confidence_enters_as_natural_logarithm() -> None:
    adapter = make_adapter({"ray": PLAIN["ray"], "ray_conf": moments([1.0], [0.5])})
    geometry = Geometry(ray=torch.zeros(1, 1, 2, 2, 6), ray_conf=torch.full((1, 1, 2, 2), math.e**3))
    tokens = adapter(geometry).embs
    np.testing.assert_allclose(tokens[0, :, 6].tolist(), [(3 - 1) / 0.5] * 4, rtol=1e-6)


def test_tokens_are_views_in_order_then_rows_then_columns() -> None:
    adapter = make_adapter({"ray": PLAIN["ray"]}, views=3, target_hw=(2, 4))
    ray = torch.zeros(2, 3, 2, 4, 6)
    numbers = torch.arange(2 * 3 * 2 * 4, dtype=torch.float32)
    ray[..., 0] = numbers.reshape(2, 3, 2, 4)
    tokens = adapter(Geometry(ray=ray))
    assert tokens.embs.shape == (2, 24, 6)
    assert tokens.embs[..., 0].flatten().tolist() == numbers.tolist()  # the same grid: copied to the bit


@pytest.mark.parametrize("target_hw", [(2, 3), (5, 6), (9, 10), (2, 9)])
def test_all_outputs_against_a_resampler_of_our_own(target_hw: tuple[int, int]) -> None:
    geometry = example()
    statistics = {name: Moments.of(name, values.numpy()) for name, values in geometry.items()}
    adapter = make_adapter(statistics, views=2, target_hw=target_hw)
    channels = []
    for name, values in geometry.items():
        wide = values.numpy().astype(np.float64).reshape(3, 2, 5, 6, -1)
        wide = np.log(wide) if name.endswith("conf") else wide
        channels.append((wide - wide.mean((0, 1, 2, 3))) / wide.std((0, 1, 2, 3)))
    rows, columns = (triangle_weights(size, target) for size, target in zip((5, 6), target_hw, strict=True))
    expected = np.einsum("yh,xw,bvhwc->bvyxc", rows, columns, np.concatenate(channels, axis=-1))
    tokens = adapter(geometry).embs.detach().numpy()
    np.testing.assert_allclose(tokens, expected.reshape(3, -1, 9), atol=2e-6)


def test_channels_follow_the_outputs() -> None:
    for outputs, channels in ((("ray",), 6), (("ray", "ray_conf"), 7), (("ray", "depth"), 7), (HEAD_OUTPUTS, 9)):
        geometry = example(outputs=outputs)
        adapter = make_adapter({name: Moments.of(name, v.numpy()) for name, v in geometry.items()}, views=2)
        assert adapter.projection.in_features == channels
        assert adapter(geometry).embs.shape == (3, 8, channels)


def test_float16_is_computed_in_float32() -> None:
    geometry = example(outputs=("ray", "ray_conf"))
    statistics = {name: Moments.of(name, values.numpy()) for name, values in geometry.items()}
    adapter = make_adapter(statistics, views=2)
    wide = Geometry(**{name: values.float() for name, values in geometry.items()})
    assert geometry.ray.dtype == torch.float16
    assert torch.equal(adapter(geometry).embs, adapter(wide).embs)
    assert adapter(geometry).embs.dtype == torch.float32


def test_the_projection_alone_works_in_its_weights_dtype() -> None:
    geometry = example(outputs=("ray", "ray_conf"))
    statistics = {name: Moments.of(name, values.numpy()) for name, values in geometry.items()}
    adapter = make_adapter(statistics, views=2)
    before = adapter.resampled(geometry)
    adapter.projection.to(torch.bfloat16)
    adapter.alpha.data = adapter.alpha.data.to(torch.bfloat16)
    assert torch.equal(adapter.resampled(geometry), before)
    assert torch.equal(adapter(geometry).embs, before.flatten(1, 2).to(torch.bfloat16))


def test_alpha_scales_and_learns() -> None:
    geometry = example(outputs=("ray", "ray_conf"))
    statistics = {name: Moments.of(name, values.numpy()) for name, values in geometry.items()}
    one, tenth = (make_adapter(statistics, views=2, init_alpha=alpha) for alpha in (1.0, 0.1))
    torch.testing.assert_close(tenth(geometry).embs, one(geometry).embs * 0.1)
    embs = tenth(geometry).embs
    embs.sum().backward()
    torch.testing.assert_close(tenth.alpha.grad, (embs.detach().sum() / 0.1)[None], rtol=1e-4, atol=1e-3)
    assert {name for name, _ in tenth.named_parameters()} == {"alpha", "projection.weight", "projection.bias"}


def test_view_embedding_is_added_to_its_view() -> None:
    adapter = make_adapter({"ray": PLAIN["ray"]}, views=2, modality_embedding=True)
    geometry = Geometry(ray=torch.zeros(1, 2, 2, 2, 6))
    assert adapter(geometry).embs.abs().sum() == 0  # starts at zero
    assert adapter.view_embedding is not None
    with torch.no_grad():
        adapter.view_embedding.copy_(torch.tensor([[1.0] * 6, [2.0] * 6]))
    assert adapter(geometry).embs[0, :, 0].tolist() == [1.0] * 4 + [2.0] * 4


@pytest.mark.parametrize(("attention", "first"), [("full", False), ("isolated", True)])
def test_masks(attention: str, first: bool) -> None:
    adapter = make_adapter(views=2, attention=attention)
    tokens = adapter(example(outputs=("ray", "ray_conf")))
    assert tokens.pad_masks.dtype == tokens.att_masks.dtype == torch.bool
    assert tokens.pad_masks.tolist() == [[True] * 8] * 3
    assert tokens.att_masks.tolist() == [[first] + [False] * 7] * 3


def test_near_constant_channels_are_not_blown_up() -> None:
    #        moving     constant      rounding noise of a large mean   constant zero
    mean = [0.0, 0.5, 100.0, 0.0, 0.0, 0.0]
    std = [2.0, 0.0, 0.01, 0.0, 1e-3, 1.0]
    adapter = make_adapter({"ray": moments(mean, std)})
    expected = [2.0, 0.5 * RELATIVE_STD_FLOOR, 100 * RELATIVE_STD_FLOOR, ABSOLUTE_STD_FLOOR, 1e-3, 1.0]
    np.testing.assert_allclose(adapter.std.tolist(), expected, rtol=1e-6)
    # One rounding of float16 at 100 is 2^-4: it stays below one deviation.
    ray = torch.zeros(1, 1, 2, 2, 6)
    ray[..., 2] = 100 + 2.0**-4
    assert adapter(Geometry(ray=ray)).embs[0, 0, 2].abs() < 1


def test_statistics_stay_float32_whatever_the_module_is_cast_to() -> None:
    """bfloat16 would move the mean 0.7013 by 0.9 of the deviation 0.002; FSDP and `.to` cast buffers."""
    mean, std = [0.7013, 0.5, 0.1, 0.0, 0.0, 0.0], [0.002, 0.1, 0.1, 0.1, 0.1, 0.1]
    adapter = make_adapter({"ray": moments(mean, std)})
    assert not list(adapter.buffers())
    adapter.to(torch.bfloat16)
    assert adapter.projection.weight.dtype == torch.bfloat16
    for values, expected in ((adapter.mean, mean), (adapter.std, std)):
        assert values.dtype == torch.float32
        np.testing.assert_allclose(values.tolist(), expected, rtol=1e-6)
    ray = torch.full((1, 1, 2, 2, 6), 0.7013)
    assert adapter.resampled(Geometry(ray=ray))[..., 0].abs().max() < 1e-3


def test_statistics_of_another_shape_are_refused() -> None:
    adapter = make_adapter({"ray": moments([0.0] * 6, [1.0] * 6)})
    for name in ("mean", "std"):
        with pytest.raises(RuntimeError, match=rf"size mismatch for {name}: .*\[3\].*\[6\]"):
            adapter.load_state_dict(adapter.state_dict() | {name: torch.ones(3)})
        lacking = {key: value for key, value in adapter.state_dict().items() if key != name}
        with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{name}"'):
            adapter.load_state_dict(lacking)


def test_statistics_are_part_of_the_checkpoint() -> None:
    adapter = make_adapter({"ray": moments([1.0, 2, 3, 4, 5, 6], [1.0] * 6)})
    assert {"mean", "std"} <= set(adapter.state_dict())
    other = make_adapter({"ray": moments([0.0] * 6, [9.0] * 6)})
    other.load_state_dict(adapter.state_dict())
    assert other.mean.tolist() == [1, 2, 3, 4, 5, 6]
    assert other.std.tolist() == [1] * 6


def test_other_outputs_than_built_for_are_a_programming_error() -> None:
    adapter = make_adapter(views=2)
    with pytest.raises(AssertionError):
        adapter(example(outputs=("ray", "depth")))
    with pytest.raises(AssertionError):
        adapter(example(views=3, outputs=("ray", "ray_conf")))
