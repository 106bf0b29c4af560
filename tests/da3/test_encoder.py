"""DA3Encoder against upstream's own InputProcessor and DepthAnything3Net, and every way in which it must refuse."""

import hashlib
import inspect
import json
import logging
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from depth_anything_3.cfg import create_object, load_config
from depth_anything_3.model.dinov2.layers import RotaryPositionEmbedding2D
from depth_anything_3.model.dualdpt import DualDPT
from depth_anything_3.registry import MODEL_REGISTRY
from depth_anything_3.utils.io.input_processor import InputProcessor
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from geomcache.da3 import encoder as encoder_module
from geomcache.da3.encoder import DA3Encoder
from geomcache.da3.preprocess import DA3Preprocessor, NetworkInput, normalise
from geomcache.da3.ray_head import ray_forward
from geomcache.errors import (
    CacheMismatchError,
    GeometryError,
    ModelError,
    NonFiniteGeometryError,
    UserInputError,
)
from geomcache.geometry import HEAD_OUTPUTS, OUTPUTS, Camera, Geometry
from pipelines import make_random_da3
from pipelines.make_random_da3 import STAND_INS, save_random_da3
from tests.support.da3 import area_average, assert_one_step, upstream_maps, upstream_network

ALL_OUTPUTS = HEAD_OUTPUTS
FRONT = Camera(key="observation.images.front", height=48, width=64)  # at 56 px: 42x56, patches 3x4
WRIST = Camera(key="observation.images.wrist", height=48, width=64)
SQUARE = Camera(key="observation.images.square", height=40, width=40)  # at 56 px: 56x56, patches 4x4


def pictures(frames: int, *cameras: Camera, seed: int = 0) -> list[NDArray[np.uint8]]:
    """V arrays uint8 [B, H, W, 3] of coarse random blocks: they differ between frames and views."""
    generator = np.random.default_rng(seed)
    blocks = [generator.integers(0, 256, (frames, c.height // 8, c.width // 8, 3), np.uint8) for c in cameras]
    return [array.repeat(8, axis=1).repeat(8, axis=2) for array in blocks]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The inputs are tiny: two threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def network(random_da3_folder: Path) -> Any:
    return upstream_network(random_da3_folder)


@pytest.fixture
def load(random_da3_folder: Path) -> Callable[..., DA3Encoder]:
    def load_encoder(*cameras: Camera, **options: Any) -> DA3Encoder:
        settings = {"process_res": 56, "device": "cpu", **options}
        return DA3Encoder.from_pretrained(str(random_da3_folder), cameras=cameras or (FRONT, WRIST), **settings)

    return load_encoder


def one_tensor(inputs: NetworkInput) -> torch.Tensor:
    """The network's input of cameras of one size."""
    assert isinstance(inputs, torch.Tensor)
    return inputs


def copy_model(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a model folder with other tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


# What the network sees


@pytest.mark.parametrize(
    ("height", "width", "process_res", "expected"),
    [
        (48, 64, 56, (42, 56)),  # smaller, whole patches
        (48, 64, 112, (84, 112)),  # larger
        (64, 48, 112, (112, 84)),  # portrait
        (60, 100, 98, (56, 98)),  # 59 rounds down to 56
        (37, 53, 100, (70, 98)),  # 100 is no multiple of 14
        (56, 56, 56, (56, 56)),  # untouched
    ],
)
def test_preprocessing_is_upstreams(height: int, width: int, process_res: int, expected: tuple[int, int]) -> None:
    camera = Camera(key="image", height=height, width=width)
    images = np.random.default_rng(1).integers(0, 256, (3, 1, height, width, 3), np.uint8)
    preprocessor = DA3Preprocessor((camera,), process_res, "upper_bound_resize")
    reference, _, _ = InputProcessor()(list(images[:, 0]), process_res=process_res)
    actual = one_tensor(preprocessor(images))
    assert preprocessor.sizes == (expected,)
    assert actual.dtype == torch.uint8
    assert torch.equal(normalise(actual)[:, 0], reference)


def test_normalisation_is_upstreams_for_every_value() -> None:
    every_value = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    expected = InputProcessor()._normalize_image(Image.fromarray(every_value))
    actual = normalise(torch.from_numpy(every_value))
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    assert torch.equal(actual, expected)


def test_preprocessing_takes_numpy_and_torch_and_travels_to_workers() -> None:
    preprocessor = DA3Preprocessor((FRONT, WRIST), 56, "upper_bound_resize")
    images = np.stack(pictures(2, FRONT, WRIST), axis=1)
    inputs = one_tensor(preprocessor(images))
    assert inputs.shape == (2, 2, 42, 56, 3)
    packed = pickle.dumps(preprocessor)
    assert len(packed) < 2000
    assert torch.equal(one_tensor(pickle.loads(packed)(torch.from_numpy(images))), inputs)
    assert torch.equal(one_tensor(preprocessor([images[:, 0], images[:, 1]])), inputs)
    turned = images[:, :, ::-1, ::-1]  # LIBERO's pictures are turned: negative strides
    assert torch.equal(one_tensor(preprocessor(turned)), one_tensor(preprocessor(turned.copy())))


def test_preprocessing_of_cameras_of_different_sizes() -> None:
    images = pictures(2, FRONT, SQUARE)
    inputs = DA3Preprocessor((FRONT, SQUARE), 56, "upper_bound_resize")(images)
    assert [list(view.shape) for view in inputs] == [[2, 42, 56, 3], [2, 56, 56, 3]]
    for view, camera_images in zip(inputs, images, strict=True):
        assert torch.equal(normalise(view), InputProcessor()(list(camera_images), process_res=56)[0])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 2, 48, 64, 3), np.float32), "expected uint8 [1, 48, 64, 3], at least one frame, got float32"),
        (np.zeros((1, 2, 3, 48, 64), np.uint8), "expected uint8 [1, 48, 64, 3], at least one frame, got uint8 [1, 3,"),
        (np.zeros((1, 2, 40, 64, 3), np.uint8), "images of observation.images.front: expected uint8 [1, 48, 64, 3]"),
        (
            np.zeros((1, 1, 48, 64, 3), np.uint8),
            "expected 2 views (observation.images.front, observation.images.wrist)",
        ),
        (np.zeros((2, 48, 64, 3), np.uint8), "expected [B, V, H, W, 3], got shape [2, 48, 64, 3]"),
        (np.zeros((0, 2, 48, 64, 3), np.uint8), "at least one frame"),
        ([np.zeros((2, 48, 64, 3), np.uint8), np.zeros((1, 48, 64, 3), np.uint8)], "wrist: expected uint8 [2, 48,"),
    ],
)
def test_images_that_are_not_the_cameras(images: Any, message: str) -> None:
    preprocessor = DA3Preprocessor((FRONT, WRIST), 56, "upper_bound_resize")
    with pytest.raises(GeometryError, match=re.escape(message)):
        preprocessor(images)


# Geometry is upstream's


@pytest.mark.parametrize("views", ["joint", "independent"])
@pytest.mark.parametrize(("process_res", "patches"), [(56, (3, 4)), (84, (5, 6))])  # 63 px, half-way, become 70
def test_geometry_is_upstreams(
    load: Callable[..., DA3Encoder],
    network: Any,
    views: str,
    process_res: int,
    patches: tuple[int, int],
) -> None:
    images = pictures(2, FRONT, WRIST)
    expected = []
    for frame in range(2):
        scenes = [[view[frame] for view in images]] if views == "joint" else [[view[frame]] for view in images]
        parts = [upstream_maps(network, scene, process_res) for scene in scenes]
        expected.append({name: np.concatenate([part[name] for part in parts]) for name in ALL_OUTPUTS})
    for outputs in (("ray",), ("ray", "ray_conf"), ("ray", "depth"), ALL_OUTPUTS):
        loaded = load(views=views, outputs=outputs, process_res=process_res)
        for grid, cells in (("native", (patches[0] * 8, patches[1] * 8)), ("patch", patches), ("5x7", (5, 7))):
            encoder = loaded.with_grid(grid)
            geometry = encoder.encode(np.stack(images, axis=1))
            geometry.check(encoder.spec)
            assert tuple(name for name, _ in geometry.items()) == outputs
            for frame in range(2):
                for name, actual in geometry.items():
                    assert actual.shape == (2, 2, *cells, *OUTPUTS[name].trailing)
                    assert_one_step(actual[frame], area_average(expected[frame][name], cells))
                    assert np.ptp(expected[frame][name]) > 0.1  # the random model's maps are no constants


def test_patch_grid_is_the_mean_over_each_patch(load: Callable[..., DA3Encoder], network: Any) -> None:
    encoder = load(outputs=ALL_OUTPUTS)
    images = pictures(1, FRONT, WRIST)
    geometry = encoder.encode(np.stack(images, axis=1))
    native = upstream_maps(network, [view[0] for view in images], 56)
    assert_one_step(geometry.ray[0], native["ray"].reshape(2, 3, 8, 4, 8, 6).mean(axis=(2, 4)))
    assert geometry.ray_conf is not None
    assert geometry.depth is not None
    assert_one_step(geometry.ray_conf[0], native["ray_conf"].reshape(2, 3, 8, 4, 8).mean(axis=(2, 4)))
    assert_one_step(geometry.depth[0], native["depth"].reshape(2, 3, 14, 4, 14).mean(axis=(2, 4)))


def test_three_views_keep_the_first_as_reference(load: Callable[..., DA3Encoder], network: Any) -> None:
    third = replace(FRONT, key="third")
    images = pictures(1, FRONT, WRIST, third)
    encoder = load(FRONT, WRIST, third, grid="native")
    geometry = encoder.encode(images)
    expected = upstream_maps(network, [view[0] for view in images], 56)
    assert_one_step(geometry.ray[0], expected["ray"])
    turned = encoder.encode([images[1], images[0], images[2]])
    assert (turned.ray[0, 1] - geometry.ray[0, 0]).abs().max() > 0.01  # the same picture beside another reference


def test_cameras_of_different_sizes(load: Callable[..., DA3Encoder], network: Any) -> None:
    images = pictures(2, FRONT, SQUARE)
    encoder = load(FRONT, SQUARE, views="independent", grid="3x3", outputs=ALL_OUTPUTS)
    geometry = encoder.encode(images)
    geometry.check(encoder.spec)
    for frame in range(2):
        for view in range(2):
            expected = upstream_maps(network, [images[view][frame]], 56)
            for name, actual in geometry.items():
                assert_one_step(actual[frame, view], area_average(expected[name], (3, 3))[0])


def test_bf16_is_upstreams_autocast_with_rotations_in_float32(
    load: Callable[..., DA3Encoder], network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(1, FRONT, WRIST)
    scene = [view[0] for view in images]
    half, single = load(dtype="bf16", grid="native"), load(dtype="fp32", grid="native")
    assert half.spec.compute_dtype == "bf16"
    in_half, in_single = half.encode(images).ray[0], single.encode(images).ray[0]
    assert_one_step(in_single, upstream_maps(network, scene, 56)["ray"])
    # On CUDA autocast's norms give the rotations float32, on a CPU bfloat16: there upstream's tables are bfloat16 too.
    rotate = RotaryPositionEmbedding2D.forward
    monkeypatch.setattr(
        RotaryPositionEmbedding2D, "forward", lambda self, x, positions: rotate(self, x.float(), positions).to(x.dtype)
    )
    assert_one_step(in_half, upstream_maps(network, scene, 56, bf16=True)["ray"])
    assert (in_half - in_single).abs().max() > 0.01
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a policy's own autocast changes nothing
        assert torch.equal(half.encode(images).ray[0], in_half)
        assert torch.equal(single.encode(images).ray[0], in_single)


def test_a_frame_does_not_depend_on_its_batch(load: Callable[..., DA3Encoder]) -> None:
    images = np.stack(pictures(5, FRONT, WRIST), axis=1)
    for views in ("joint", "independent"):
        encoder = load(views=views, outputs=ALL_OUTPUTS, grid="native")
        together = encoder.encode(images)
        for frame in range(5):
            for name, alone in encoder.encode(images[frame : frame + 1]).items():
                assert_one_step(getattr(together, name)[frame], alone[0].numpy())


def test_views_see_each_other_only_in_joint(load: Callable[..., DA3Encoder]) -> None:
    images = np.stack(pictures(2, FRONT, WRIST), axis=1)
    changed = images.copy()
    changed[1, 1] = 255 - changed[1, 1]  # another picture: frame 1, wrist
    joint = load(views="joint")
    before, after = (joint.encode(batch).ray.float() for batch in (images, changed))
    torch.testing.assert_close(after[0], before[0], rtol=2.0**-10, atol=4e-6)  # frames do not
    assert (after[1, 0] - before[1, 0]).abs().max() > 0.01
    independent = load(views="independent")
    before, after = (independent.encode(batch).ray.float() for batch in (images, changed))
    torch.testing.assert_close(after[1, 0], before[1, 0], rtol=2.0**-10, atol=4e-6)
    assert (after[1, 1] - before[1, 1]).abs().max() > 0.01


# The ray-only forward


@pytest.mark.parametrize(("scenes", "views"), [(1, 2), (3, 2), (4, 1)])
@pytest.mark.parametrize(("height", "width"), [(42, 56), (112, 84)])
def test_ray_forward_equals_the_whole_head_to_the_bit(
    network: Any, scenes: int, views: int, height: int, width: int
) -> None:
    images = torch.randn(scenes, views, 3, height, width, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        features, _ = network.backbone(images, cam_token=None, export_feat_layers=[], ref_view_strategy="first")
        whole = network.head(features, height, width, patch_start_idx=0)
        rays = ray_forward(network.head, [feature for feature, _ in features], height, width)
    assert rays.keys() == {"ray", "ray_conf"}
    for name, values in rays.items():
        assert values.shape == whole[name].shape
        assert torch.equal(values, whole[name])


def test_ray_forward_runs_no_depth_chain(load: Callable[..., DA3Encoder]) -> None:
    encoder = load()
    ran: list[str] = []
    head: Any = encoder._network["head"]
    for name, module in head.scratch.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    encoder.encode(pictures(1, FRONT, WRIST))
    assert {name.partition(".")[0] for name in ran} == {
        *(f"layer{level}_rn" for level in (1, 2, 3, 4)),
        *(f"refinenet{level}_aux" for level in (1, 2, 3, 4)),
        "output_conv1_aux",
        "output_conv2_aux",
    }
    assert {name.split(".")[1] for name in ran if name.startswith("output_conv")} == {"3"}  # the last of four levels
    assert len(ran) == len(set(ran))


def test_upstreams_head_is_the_one_that_ray_forward_follows() -> None:
    source = "".join(inspect.getsource(f) for f in (DualDPT.forward, DualDPT._forward_impl, DualDPT._fuse))
    assert hashlib.sha256(source.encode()).hexdigest() == HEAD_SHA256, (
        "upstream's DualDPT.forward, _forward_impl or _fuse changed: compare geomcache/da3/ray_head.py with them line"
        " by line, then write the new hash here"
    )


HEAD_SHA256 = "50b188a1c95c75ea8579aa443bae7ee9cf1ac7d0520cdc5f5e46978b02cad12e"


# The spec


def test_spec_says_what_was_computed(load: Callable[..., DA3Encoder], random_da3_folder: Path) -> None:
    spec = load(outputs=("depth", "ray"), grid="5x7").spec
    assert spec.model_id == str(random_da3_folder)
    assert spec.model_revision is None
    assert spec.model_name == "da3-small"
    assert spec.weights_sha256 == hashlib.sha256((random_da3_folder / "model.safetensors").read_bytes()).hexdigest()
    assert spec.da3_version == "0.1.1"
    assert spec.cameras == (FRONT, WRIST)
    assert (spec.views, spec.process_res, spec.grid, spec.grid_hw) == ("joint", 56, "5x7", (5, 7))
    assert spec.outputs == ("ray", "depth")
    assert spec.compute_dtype == "fp32"
    assert spec.resize_method == "upper_bound_resize"
    assert spec.reference_view == "first"


def test_grid_is_known_without_running(load: Callable[..., DA3Encoder]) -> None:
    encoder = load()
    assert encoder.spec.grid_hw == (3, 4)
    native = encoder.with_grid("native")
    assert native.spec == replace(encoder.spec, grid="native", grid_hw=(24, 32))
    native.encode(pictures(1, FRONT, WRIST))
    assert (encoder.calls, native.calls) == (0, 1)
    libero = Camera(key="image", height=256, width=256)
    assert load(libero, process_res=504).spec.grid_hw == (36, 36)
    assert load(libero, process_res=504, grid="native").spec.grid_hw == (288, 288)
    assert load(Camera(key="image", height=480, width=640), process_res=504).spec.grid_hw == (27, 36)


def test_from_spec_computes_the_same(load: Callable[..., DA3Encoder], random_da3_folder: Path, tmp_path: Path) -> None:
    images = pictures(1, FRONT, WRIST)
    first = load(outputs=ALL_OUTPUTS, grid="2x3", dtype="bf16")
    again = DA3Encoder.from_spec(first.spec, device="cpu")
    assert again.spec == first.spec
    for name, values in again.encode(images).items():
        assert torch.equal(values, getattr(first.encode(images), name))
    moved = tmp_path / "moved"
    moved.symlink_to(random_da3_folder)
    gone = replace(first.spec, model_id=str(tmp_path / "gone"))
    with pytest.raises(ModelError, match="gone: "):
        DA3Encoder.from_spec(gone)
    assert DA3Encoder.from_spec(gone, model=str(moved), device="cpu").spec == gone


@pytest.mark.parametrize(
    ("field", "value"),
    [("da3_version", "0.0.9"), ("resize_method", "lower_bound_crop"), ("reference_view", "middle"), ("grid_hw", (5, 5)),
     ("model_name", "da3-base")],
)  # fmt: skip
def test_from_spec_refuses_what_it_would_not_compute(load: Callable[..., DA3Encoder], field: str, value: Any) -> None:
    spec = load().spec
    with pytest.raises(CacheMismatchError, match=f"spec.{field}") as caught:
        DA3Encoder.from_spec(replace(spec, **{field: value}))
    assert (caught.value.field, caught.value.cached, caught.value.wanted) == (
        f"spec.{field}",
        value,
        getattr(spec, field),
    )
    assert repr(value) in str(caught.value)
    assert repr(getattr(spec, field)) in str(caught.value)


def test_from_spec_refuses_other_weights(load: Callable[..., DA3Encoder]) -> None:
    spec = load().spec
    with pytest.raises(ModelError, match=f"sha256 {'0' * 64}, found {spec.weights_sha256}"):
        DA3Encoder.from_spec(replace(spec, weights_sha256="0" * 64))


# Options that cannot be used


@pytest.mark.parametrize(
    ("cameras", "options", "message"),
    [
        (
            (FRONT, SQUARE),
            {},
            "front 42x56, observation.images.square 56x56: choose --cameras of one shape, or --views",
        ),
        ((FRONT, SQUARE), {"views": "independent"}, "grid: patch is not the same for all views"),
        (
            (FRONT, SQUARE),
            {"views": "independent", "grid": "25x8"},
            "at most the native 24x32 of observation.images.front",
        ),
        ((FRONT, WRIST), {"grid": "3x33"}, "expected at most the native 24x32"),
        ((FRONT, WRIST), {"grid": "14"}, "grid: expected 'patch', 'native' or HxW"),
        ((FRONT, WRIST), {"views": "both"}, "views: expected 'joint' or 'independent', got 'both'"),
        ((FRONT, WRIST), {"process_res": 0}, "process-res: expected 14 to 8192"),
        ((FRONT, WRIST), {"outputs": ("depth",)}, "outputs: expected 'ray'"),
        ((FRONT, WRIST), {"dtype": "fp16"}, "dtype: expected 'fp32' or 'bf16'"),
        ((FRONT, FRONT), {}, "cameras: expected each once"),
        ((), {}, "cameras: expected at least one"),
        ((Camera(key="image", height=10, width=100),), {}, "at 56, image of 10x100 becomes narrower than a patch"),
        ((FRONT, WRIST), {"device": "tpu"}, "device: expected cpu, cuda or cuda:N, got 'tpu'"),
        ((FRONT, WRIST), {"device": "meta"}, "device: expected cpu, cuda or cuda:N, got meta"),
        ((FRONT, WRIST), {"device": "cuda:77"}, "got cuda:77: torch sees"),
    ],
)
def test_options_that_cannot_be_used(cameras: tuple[Camera, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError, match=re.escape(message)):  # before the model is looked for
        DA3Encoder.from_pretrained("no such model", cameras=cameras, **{"process_res": 56, **options})


# Weights that cannot be used


def test_missing_weights_are_named(random_da3_folder: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.head.projects")]:
            del tensors[name]

    folder = copy_model(random_da3_folder, tmp_path / "model", change)
    message = (
        "expected all 363 tensors of backbone and head, missing 8: model.head.projects.0.weight, model.head.projects"
    )
    with pytest.raises(ModelError, match=re.escape(message)):
        DA3Encoder.from_pretrained(str(folder), cameras=(FRONT,), process_res=56)


def test_weights_of_another_shape_are_named(random_da3_folder: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.head.norm.weight"] = torch.ones(5)

    folder = copy_model(random_da3_folder, tmp_path / "model", change)
    message = ", not fitting 1: model.head.norm.weight of F32 [5], expected [768]: are config.json and weights of"
    with pytest.raises(ModelError, match=re.escape(message)):
        DA3Encoder.from_pretrained(str(folder), cameras=(FRONT,), process_res=56)
    (folder / "config.json").write_text('{"model_name": "da3-base"}')
    with pytest.raises(
        ModelError, match=re.escape("backbone.pretrained.cls_token of F32 [1, 1, 384], expected [1, 1, 768]")
    ):
        DA3Encoder.from_pretrained(str(folder), cameras=(FRONT,), process_res=56)


def test_quantised_weights_are_refused(random_da3_folder: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.head.norm.weight"] = torch.ones(768, dtype=torch.int8)

    folder = copy_model(random_da3_folder, tmp_path / "model", change)
    with pytest.raises(ModelError, match=re.escape("model.head.norm.weight of I8 [768]")):
        DA3Encoder.from_pretrained(str(folder), cameras=(FRONT,), process_res=56)


def test_weights_without_the_prefix_are_shown(random_da3_folder: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    folder = copy_model(random_da3_folder, tmp_path / "model", change)
    with pytest.raises(ModelError, match=r"missing 363: .*, unknown 437: backbone\.pretrained"):
        DA3Encoder.from_pretrained(str(folder), cameras=(FRONT,), process_res=56)


@pytest.mark.parametrize("content", ["cut", "text", "empty"])
def test_files_that_are_no_weights(random_da3_folder: Path, tmp_path: Path, content: str) -> None:
    whole = (random_da3_folder / "model.safetensors").read_bytes()
    bytes_ = {"cut": whole[: len(whole) // 2], "text": b"version https://git-lfs", "empty": b""}[content]
    (tmp_path / "model.safetensors").write_bytes(bytes_)
    (tmp_path / "config.json").write_text('{"model_name": "da3-small"}')
    with pytest.raises(ModelError, match=r"model\.safetensors") as caught:
        DA3Encoder.from_pretrained(str(tmp_path), cameras=(FRONT,), process_res=56)
    assert "\n" not in str(caught.value)


def test_parts_that_do_not_run_are_counted(
    random_da3_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.cam_enc.")]:
            del tensors[name]
        tensors["model.extra.weight"] = torch.ones(1)

    caplog.set_level(logging.INFO, logger="geomcache")
    DA3Encoder.from_pretrained(str(random_da3_folder), cameras=(FRONT,), process_res=56)
    folder = copy_model(random_da3_folder, tmp_path / "model", change)
    DA3Encoder.from_pretrained(str(folder), cameras=(FRONT,), process_res=56)
    fine, odd = caplog.records
    start = "tensors of backbone and head loaded; of parts that are not run"
    assert fine.levelno == logging.INFO
    assert fine.getMessage().endswith(f"363 {start}, 74 left out")
    assert odd.levelno == logging.WARNING
    assert re.search(
        rf"363 {start}, 10 left out, missing 64: model\.cam_enc\..*; unknown to the network 1: model\.extra\.weight$",
        odd.getMessage(),
    )


def test_half_precision_files_and_shared_names(
    random_da3_folder: Path, tmp_path: Path, load: Callable[..., DA3Encoder]
) -> None:
    """Upstream's four auxiliary outputs share a LayerNorm: its file holds it once, other writers' under all names."""
    names = [f"model.head.scratch.output_conv2_aux.{level}.2.weight" for level in range(4)]
    held = load_file(random_da3_folder / "model.safetensors").keys()
    assert sum(name in held for name in names) == 1

    def change(tensors: dict[str, torch.Tensor]) -> None:
        value = tensors.pop(next(name for name in names if name in tensors))
        for factor, name in enumerate(names):
            tensors[name] = value * factor  # upstream's loading ends with the last
        for name in tensors:
            tensors[name] = tensors[name].to(torch.bfloat16)

    folder = copy_model(random_da3_folder, tmp_path / "model", change)
    encoder = DA3Encoder.from_pretrained(str(folder), cameras=(FRONT, WRIST), process_res=56, grid="native")
    reference = upstream_network(random_da3_folder)
    holder = torch.nn.Module()
    holder.model = reference
    holder.load_state_dict(
        {name: t.float() for name, t in load_file(folder / "model.safetensors").items()}, strict=False
    )
    images = pictures(1, FRONT, WRIST)
    assert_one_step(encoder.encode(images).ray[0], upstream_maps(reference, [view[0] for view in images], 56)["ray"])


def test_nested_models_use_their_any_view_branch(
    random_da3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[..., DA3Encoder]
) -> None:
    """A nested model of upstream's class with a small any-view branch: its names, and the geometry of that branch."""
    preset = tmp_path / "nested.yaml"
    preset.write_text(
        json.dumps(
            {
                "__object__": {
                    "path": "depth_anything_3.model.da3",
                    "name": "NestedDepthAnything3Net",
                    "args": "as_params",
                },
                "anyview": {"__inherit__": "depth_anything_3.configs.da3-small"},
                "metric": {"__inherit__": "depth_anything_3.configs.da3metric-large"},
            }
        )
    )
    monkeypatch.setitem(MODEL_REGISTRY, "da3nested-giant-large", str(preset))
    with init_empty_weights():
        nested = create_object(load_config(str(preset)))
    names = {f"model.{name}" for name in nested.state_dict()}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("model.", "model.da3.", 1)] = tensors.pop(name)
        assert tensors.keys() <= names

    folder = copy_model(random_da3_folder, tmp_path / "model", change)
    (folder / "config.json").write_text('{"model_name": "da3nested-giant-large"}')
    images = pictures(1, FRONT, WRIST)
    nested_encoder = DA3Encoder.from_pretrained(str(folder), cameras=(FRONT, WRIST), process_res=56, device="cpu")
    assert nested_encoder.spec.model_name == "da3nested-giant-large"
    assert torch.equal(nested_encoder.encode(images).ray, load().encode(images).ray)


@pytest.mark.parametrize("preset", ["da3-small", "da3-base", "da3-large", "da3-giant", "da3nested-giant-large"])
def test_every_ray_model_has_the_parts(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(encoder_module, "load_weights", lambda network, path, **kw: asked.update(network=network, **kw))
    encoder_module._load_network(preset, Path("unread"), torch.device("cpu"))
    assert isinstance(asked["network"]["head"], DualDPT)
    nested = preset.startswith("da3nested")
    assert asked["prefix"] == ("model.da3." if nested else "model.")
    parts = {name.removeprefix(asked["prefix"]).partition(".")[0] for name in asked["unused"]}
    giant = "giant" in preset
    assert parts == {"cam_enc", "cam_dec"} | ({"gs_head"} if giant else set()) | ({"model"} if nested else set())
    assert all(parameter.is_meta for parameter in asked["network"].parameters())  # no memory for what will be replaced


# Numbers that are none, and the rest of the contract


def test_beyond_float16_saturates(random_da3_folder: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        bias = tensors["model.head.scratch.output_conv2_aux.3.5.bias"]
        bias += torch.tensor([1e6, -1e6, 0, 0, 0, 0, 200.0])  # exp(200) is infinite in float32

    folder = copy_model(random_da3_folder, tmp_path / "model", change)
    for grid in ("native", "patch"):
        encoder = DA3Encoder.from_pretrained(str(folder), cameras=(FRONT, WRIST), process_res=56, grid=grid)
        geometry = encoder.encode(pictures(2, FRONT, WRIST))
        assert (geometry.ray[..., 0] == 65504).all()
        assert (geometry.ray[..., 1] == -65504).all()
        assert geometry.ray[..., 2:].abs().max() < 100
        assert geometry.ray_conf is not None
        assert (geometry.ray_conf.numpy() == 65504).all()


def test_nan_is_an_error_with_places(load: Callable[..., DA3Encoder]) -> None:
    encoder = load(outputs=ALL_OUTPUTS)
    images = pictures(3, FRONT, WRIST)

    def poison(_module: object, _args: object, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[3, 6, 0, 0] = torch.nan  # frame 1, view 1, ray_conf
        logits[4, :, 2, 1] = torch.nan  # frame 2, view 0, both
        return logits

    head: Any = encoder._network["head"]
    hook = head.scratch.output_conv2_aux[-1].register_forward_hook(poison)
    message = "NaN for frame 1 of the batch, observation.images.wrist, ray_conf and 2 more maps"
    with pytest.raises(NonFiniteGeometryError, match=re.escape(message)) as caught:
        encoder.encode(images)
    assert caught.value.places == ((1, 1, "ray_conf"), (2, 0, "ray"), (2, 0, "ray_conf"))
    hook.remove()
    encoder.encode(images)


def test_geometry_is_ordinary_tensors(load: Callable[..., DA3Encoder]) -> None:
    encoder = load(outputs=ALL_OUTPUTS, grid="native")
    inputs = one_tensor(encoder.preprocess(pictures(2, FRONT, WRIST)))
    before = inputs.clone()
    geometry = encoder.forward(inputs)
    assert isinstance(geometry, Geometry)
    assert torch.equal(inputs, before)
    for name, values in geometry.items():
        assert values.dtype == torch.float16, name
        assert values.is_contiguous()
        assert not values.is_inference()
        assert not values.requires_grad
    assert encoder.device == torch.device("cpu")
    assert encoder.calls == 1
    assert not any(parameter.requires_grad for parameter in encoder._network.parameters())
    assert not any(module.training for module in encoder._network.modules())
    assert torch.nn.Module not in type(encoder).__mro__


@pytest.mark.parametrize(
    "inputs",
    [
        torch.zeros(2, 2, 56, 56, 3, dtype=torch.uint8),
        torch.zeros(2, 1, 42, 56, 3, dtype=torch.uint8),
        torch.zeros(0, 2, 42, 56, 3, dtype=torch.uint8),
        torch.zeros(2, 42, 56, 3, dtype=torch.uint8),
        torch.zeros(2, 2, 42, 56, 3),
        torch.zeros(2, 2, 3, 42, 56, dtype=torch.uint8),
        [torch.zeros(2, 42, 56, 3, dtype=torch.uint8)] * 2,
        [],
    ],
)
def test_inputs_that_preprocess_does_not_give(load: Callable[..., DA3Encoder], inputs: Any) -> None:
    encoder = load()
    with pytest.raises(GeometryError, match="inputs: "):
        encoder.forward(inputs)
    assert encoder.calls == 0


@pytest.mark.parametrize(("dtype", "tf32_convolutions"), [("bf16", True), ("fp32", False)])
def test_a_trainers_cuda_switches_do_not_reach_the_network(
    load: Callable[..., DA3Encoder], dtype: str, tf32_convolutions: bool
) -> None:
    encoder = load(dtype=dtype)
    inputs = encoder.preprocess(pictures(1, FRONT, WRIST))
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    seen: list[tuple[bool, bool, bool]] = []
    head: Any = encoder._network["head"]
    head.norm.register_forward_hook(lambda *_: seen.append((cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32)))
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    try:
        for allowed in (False, True):
            cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, allowed, True
            encoder.forward(inputs)
            assert (cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32) == (True, allowed, True)
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
    assert set(seen) == {(False, tf32_convolutions, False)}


# The model of the tests


def test_random_model_is_upstreams_folder_and_says_that_it_is_random(
    random_da3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def digest(folder: Path) -> str:
        return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()

    state = torch.get_rng_state()
    save_random_da3(tmp_path / "same")
    assert torch.equal(torch.get_rng_state(), state)
    assert digest(tmp_path / "same") == digest(random_da3_folder)
    monkeypatch.setattr(sys, "argv", ["make_random_da3.py", "--output", str(tmp_path / "other"), "--seed", "1"])
    make_random_da3.main()
    assert digest(tmp_path / "other") != digest(random_da3_folder)
    assert "RANDOM weights. Geometry computed with them is MEANINGLESS" in capsys.readouterr().out
    assert "meaningless" in (tmp_path / "other" / "RANDOM_WEIGHTS.txt").read_text()
    assert json.loads((tmp_path / "other" / "config.json").read_text()) == {"model_name": "da3-small"}
    assert not {"depth_anything_3.api", *STAND_INS} & set(sys.modules)  # stand-ins are gone again


def test_random_model_tells_frames_and_views_apart(load: Callable[..., DA3Encoder]) -> None:
    encoder = load(outputs=ALL_OUTPUTS, grid="native", process_res=112)
    geometry = encoder.encode(pictures(2, FRONT, WRIST))
    for name, values in geometry.items():
        maps = values.float()
        scale = maps.std()
        assert maps.flatten(2, 3).std(dim=2).mean() > 0.3 * scale, name  # over the picture
        assert (maps[0] - maps[1]).abs().mean() > 0.2 * scale, name  # between frames
        assert (maps[:, 0] - maps[:, 1]).abs().mean() > 0.2 * scale, name  # between views
        assert maps.abs().max() < 100, name  # far from float16's limit


def test_importing_brings_no_storage_no_lerobot_and_no_talk() -> None:
    script = (
        "import sys, geomcache.da3.encoder\n"
        "from depth_anything_3.utils.logger import LOG_LEVELS, logger\n"
        "print(sorted({'zarr', 'numcodecs', 'lerobot', 'depth_anything_3.api'} & set(sys.modules)))\n"
        "print(logger.level == LOG_LEVELS['ERROR'])\n"  # a line for each call of three views otherwise
    )
    environment = {name: value for name, value in os.environ.items() if name != "DA3_LOG_LEVEL"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "[]\nTrue\n"
