"""DA3Encoder: images -> Geometry, with Depth Anything 3's own network and preprocessing. Its only importer.

Legend:  B frames   V views   N, S batch and views as the network sees them   H, W pixels   h, w grid   C channels

The network is upstream's backbone and head, called as ``DepthAnything3Net.forward`` calls them: the whole of that
function deletes the rays. ``joint``: the V views of a frame are one scene (N = B, S = V), and the first is the
reference. ``independent``: every image is a scene of its own (N = B*V, S = 1). Frames are never views of one another.

The head's maps are averaged over the cells of the spec's grid, in float32, as they are: directions are not normalised
before or after, confidences are not taken as logarithms. Then they are rounded to float16, saturating.
"""

import dataclasses
import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

os.environ.setdefault("DA3_LOG_LEVEL", "ERROR")  # read when upstream is imported: its logger prints to standard output

import numpy as np
import torch
from accelerate import init_empty_weights
from depth_anything_3.cfg import create_object, load_config
from depth_anything_3.registry import MODEL_REGISTRY
from depth_anything_3.utils.io.input_processor import InputProcessor
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from geomcache.da3.catalog import find_model
from geomcache.da3.checks import Images, check_device, check_images, check_same, choose_grid_hw, raise_nan
from geomcache.da3.ray_head import ray_forward
from geomcache.da3.weights import load_weights, sha256
from geomcache.errors import GeometryError, ModelError, UserInputError
from geomcache.geometry import (
    DEFAULT_OUTPUTS,
    FLOAT16_MAX,
    PATCH_SIZE,
    Camera,
    ComputeDtype,
    Geometry,
    GeometrySpec,
    Views,
)

NetworkInput = Tensor | list[Tensor]
"""float32 [B, V, 3, H, W], or V of [B, 3, H_v, W_v] where the processed sizes differ."""

RESIZE_METHOD, REFERENCE_VIEW = GeometrySpec.resize_method, GeometrySpec.reference_view  # the only ones in use


@dataclass(frozen=True)
class DA3Preprocessor:
    """Images -> what the network sees, by upstream's InputProcessor. No weights: decoding workers run it."""

    cameras: tuple[Camera, ...]
    process_res: int
    resize_method: str
    sizes: tuple[tuple[int, int], ...] = field(init=False)
    """(H, W) of each view as the network sees it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self._processed_size(camera) for camera in self.cameras))

    def __call__(self, images: Images) -> NetworkInput:
        """Resize to `process_res`, round to whole patches and normalise, image by image, in the calling thread.

        Args:
            images: uint8 [B, V, H, W, 3], or a sequence of V arrays [B, H_v, W_v, 3]; NumPy or torch, RGB.

        Returns:
            float32 [B, V, 3, H, W] on the CPU; V tensors [B, 3, H_v, W_v] where the processed sizes differ.

        Raises:
            GeometryError: shapes, dtype or number of views are not those of the cameras.
        """
        views = check_images(images, self.cameras)
        batch = len(views[0])
        inputs: NetworkInput
        if len(set(self.sizes)) == 1:
            inputs = torch.empty(batch, len(views), 3, *self.sizes[0])
            targets = list(inputs.unbind(1))
        else:
            inputs = targets = [torch.empty(batch, 3, *size) for size in self.sizes]
        for view, target in zip(views, targets, strict=True):
            for image, row in zip(view, target, strict=True):
                row.copy_(self._process(image))
        return inputs

    def _process(self, image: NDArray[np.uint8]) -> Tensor:
        """uint8 [H_v, W_v, 3] -> float32 [3, H, W]: the step that InputProcessor's call runs in a pool of threads."""
        processed: Tensor = InputProcessor()._process_one(
            image, process_res=self.process_res, process_res_method=self.resize_method
        )[0]
        return processed

    def _processed_size(self, camera: Camera) -> tuple[int, int]:
        height, width = self._process(np.zeros((camera.height, camera.width, 3), np.uint8)).shape[1:]
        if height % PATCH_SIZE or width % PATCH_SIZE:
            raise UserInputError(
                f"process-res: at {self.process_res}, {camera.key} of {camera.height}x{camera.width} becomes narrower"
                f" than a patch of {PATCH_SIZE} pixels: raise it"
            )
        return height, width


class PendingGeometry:
    """Geometry that the device is computing, on its way to the host."""

    def __init__(self, maps: dict[str, Tensor], nan: Tensor, camera_keys: tuple[str, ...]) -> None:
        # On CUDA into page-locked memory, without waiting for it.
        self._maps = {name: values.to("cpu", non_blocking=True) for name, values in maps.items()}
        self._nan = nan.to("cpu", non_blocking=True)
        self._camera_keys = camera_keys
        self._done: torch.cuda.Event | None = None
        if nan.is_cuda:
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(torch.cuda.current_stream(nan.device))

    def result(self) -> Geometry:
        """Wait for it: what `DA3Encoder.forward` gives, on the CPU. Raises what that raises for NaN."""
        if self._done is not None:
            self._done.synchronize()
        raise_nan(self._nan, list(self._maps), self._camera_keys)
        return Geometry(**self._maps)


class DA3Encoder:
    """Depth Anything 3 with fixed settings: images of B frames -> their geometry.

    It is no ``nn.Module``: a policy that holds one keeps it out of its parameters and checkpoints.
    """

    def __init__(
        self, spec: GeometrySpec, preprocessor: DA3Preprocessor, network: nn.ModuleDict, device: torch.device
    ) -> None:
        self.spec = spec
        self.device = device
        self.preprocessor = preprocessor
        self.calls = 0
        """How often `forward` ran."""
        self._network = network
        self._copies: torch.cuda.Stream | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        cameras: Sequence[Camera],
        revision: str | None = None,
        views: Views = "joint",
        process_res: int = 504,
        grid: str = "patch",
        outputs: Sequence[str] = DEFAULT_OUTPUTS,
        device: str | torch.device | None = None,
        dtype: ComputeDtype | None = None,
    ) -> Self:
        """Load a model for the given cameras.

        Args:
            model: a DA3 name in any case, a Hub id, or a folder with ``config.json`` and ``model.safetensors``.
            cameras: the views, in order; the first is the reference.
            revision: branch, tag or commit on the Hub.
            views: ``joint`` or ``independent``.
            process_res: longest side, in pixels, of what the network sees.
            grid: ``patch``, ``native``, or ``HxW``: an area average to so many cells, at most the native ones.
            outputs: ``ray`` and any other of `OUTPUTS`. Without depth, the head takes about half the time.
            device: None for CUDA where there is one, else the CPU.
            dtype: of the backbone; None for ``bf16`` on CUDA and ``fp32`` on the CPU. The head is always float32.

        Raises:
            ModelError: unknown model, no ray head, or weights that are missing or do not fit (or ModelNotFoundError).
            UserInputError: an option that cannot be used, or cameras that cannot be used together.
        """
        where = check_device(device)
        draft = GeometrySpec(
            model_id=model,
            model_revision=None,
            model_name="",
            weights_sha256="",
            da3_version=_da3_version(),
            views=views,
            cameras=tuple(cameras),
            process_res=process_res,
            grid=grid,
            grid_hw=(1, 1),
            outputs=tuple(outputs),
            compute_dtype=dtype or ("bf16" if where.type == "cuda" else "fp32"),
        )
        # The options are checked above and here, before anything is downloaded or read.
        preprocessor = DA3Preprocessor(draft.cameras, draft.process_res, draft.resize_method)
        grid_hw = choose_grid_hw(draft, preprocessor.sizes)
        files = find_model(model, revision)
        spec = dataclasses.replace(
            draft,
            model_id=files.model_id,
            model_revision=files.revision,
            model_name=files.preset,
            weights_sha256=sha256(files.weights),
            grid_hw=grid_hw,
        )
        return cls(spec, preprocessor, _load_network(files.preset, files.weights, where), where)

    @classmethod
    def from_spec(
        cls, spec: GeometrySpec, *, model: str | None = None, device: str | torch.device | None = None
    ) -> Self:
        """Build the encoder that a cache was made with.

        Args:
            spec: the cache's.
            model: where to look for the weights, instead of the spec's model and revision.
            device: as in `from_pretrained`.

        Raises:
            ModelError: the weights are not there, or not the spec's.
            CacheMismatchError: this encoder would not compute what the spec says.
        """
        where = check_device(device)
        check_same(spec, da3_version=_da3_version(), resize_method=RESIZE_METHOD, reference_view=REFERENCE_VIEW)
        preprocessor = DA3Preprocessor(spec.cameras, spec.process_res, spec.resize_method)
        check_same(spec, grid_hw=choose_grid_hw(spec, preprocessor.sizes))
        files = find_model(model or spec.model_id, None if model else spec.model_revision)
        found = sha256(files.weights)
        if found != spec.weights_sha256:
            raise ModelError(
                f"model {files.model_id}: expected the weights that the cache was made with,"
                f" sha256 {spec.weights_sha256}, found {found} in {files.weights}: name the right model or folder"
            )
        check_same(spec, model_name=files.preset)
        return cls(spec, preprocessor, _load_network(files.preset, files.weights, where), where)

    def with_grid(self, grid: str) -> Self:
        """The same network and settings with another output grid. Its calls are counted apart.

        Raises:
            UserInputError: the grid cannot be used with these cameras.
        """
        spec = dataclasses.replace(self.spec, grid=grid)
        spec = dataclasses.replace(spec, grid_hw=choose_grid_hw(spec, self.preprocessor.sizes))
        return type(self)(spec, self.preprocessor, self._network, self.device)

    def preprocess(self, images: Images) -> NetworkInput:
        """What `preprocessor` does."""
        return self.preprocessor(images)

    def encode(self, images: Images) -> Geometry:
        """Geometry of B frames: uint8 images, as `DA3Preprocessor` takes them -> what `forward` gives."""
        return self.forward(self.preprocess(images))

    def forward(self, inputs: NetworkInput) -> Geometry:
        """Geometry of B preprocessed frames.

        Args:
            inputs: of `preprocess`, on any device.

        Returns:
            float16 tensors [B, V, h, w, ...] on the encoder's device, contiguous. Values beyond float16, infinite
            ones too, are at its limit of 65504.

        Raises:
            GeometryError: shapes are not those of `preprocess`.
            NonFiniteGeometryError: the network gave NaN.
        """
        maps, nan = self._compute(inputs)
        raise_nan(nan, list(maps), self.spec.camera_keys)
        return Geometry(**maps)

    def launch(self, inputs: NetworkInput) -> PendingGeometry:
        """Start `forward` and do not wait for the device: the next batch can be handed over before this one is read.

        Raises:
            GeometryError: shapes are not those of `preprocess`.
        """
        return PendingGeometry(*self._compute(inputs), self.spec.camera_keys)

    def _compute(self, inputs: NetworkInput) -> tuple[dict[str, Tensor], Tensor]:
        """Rounded maps [B, V, h, w, ...] of each output, and whether each has a NaN, bool [B, V, outputs]."""
        self._check_inputs(inputs)
        self.calls += 1
        with torch.inference_mode(), _default_numerics():
            if isinstance(inputs, list):
                parts = [self._maps(view[:, None]) for view in inputs]  # [B, 1, h, w, ...] each
                maps = {name: torch.cat([part[name] for part in parts], dim=1) for name in self.spec.outputs}
            elif self.spec.views == "joint":
                maps = self._maps(inputs)
            else:
                maps = self._maps(inputs.flatten(0, 1)[:, None])  # [B*V, 1, h, w, ...]
                maps = {name: values.reshape(*inputs.shape[:2], *values.shape[2:]) for name, values in maps.items()}
        # Outside of inference_mode, so that what is returned are ordinary tensors.
        rounded = {
            name: values.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16, memory_format=torch.contiguous_format)
            for name, values in maps.items()
        }
        return rounded, torch.stack([values.isnan().flatten(2).any(-1) for values in rounded.values()], dim=-1)

    def _upload(self, images: Tensor) -> Tensor:
        """The images on the device. Page-locked ones are copied while the device computes what it was given before."""
        if not images.is_pinned():
            return images.to(self.device)
        if self._copies is None:
            self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._copies):
            uploaded = images.to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._copies)
        uploaded.record_stream(computing)  # its memory is not given away while it is in use there
        return uploaded

    def _maps(self, images: Tensor) -> dict[str, Tensor]:
        """float32 [N, S, 3, H, W] -> float32 [N, S, h, w, ...] of each output, on the spec's grid."""
        images = self._upload(images)
        height, width = images.shape[-2:]
        backbone, head = self._network["backbone"], self._network["head"]
        bf16 = self.spec.compute_dtype == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            features, _ = backbone(
                images, cam_token=None, export_feat_layers=[], ref_view_strategy=self.spec.reference_view
            )
        with torch.autocast(self.device.type, enabled=False):
            if set(self.spec.outputs) <= {"ray", "ray_conf"}:
                maps = ray_forward(head, [feature for feature, _ in features], height, width)
            else:
                maps = head(features, height, width, patch_start_idx=0)
        return {name: _average(maps[name], self.spec.grid_hw) for name in self.spec.outputs}

    def _check_inputs(self, inputs: NetworkInput) -> None:
        sizes = self.preprocessor.sizes
        one_size = len(set(sizes)) == 1
        found = [list(inputs.shape)] if isinstance(inputs, Tensor) else [list(view.shape) for view in inputs]
        batch = found[0][0] if found and found[0] else 0
        expected = [[batch, len(sizes), 3, *sizes[0]]] if one_size else [[batch, 3, *size] for size in sizes]
        if isinstance(inputs, Tensor) != one_size or found != expected or batch == 0:
            raise GeometryError(f"inputs: expected what preprocess gives, {expected}, got shapes {found}")


def _average(values: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Area average: [N, S, h', w'] or [N, S, h', w', C] -> the same on `grid_hw`, the mean of the cells under each."""
    if values.shape[2:4] == grid_hw:
        return values
    if values.ndim == 4:
        return adaptive_avg_pool2d(values, grid_hw)
    averaged = adaptive_avg_pool2d(values.flatten(0, 1).movedim(-1, 1), grid_hw)  # [N*S, C, h, w]
    return averaged.movedim(1, -1).reshape(*values.shape[:2], *grid_hw, values.shape[-1])


@contextmanager
def _default_numerics() -> Iterator[None]:
    """CUDA's switches as torch starts with them and upstream runs.

    LeRobot's training and evaluation turn on TF32 matrix products and cuDNN's benchmark mode: online geometry would not
    be what extraction computed. Convolutions may use TF32, as they do by default.
    """
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, benchmark=False, allow_tf32=True):
            yield
    finally:
        matmul.allow_tf32 = allowed


def _load_network(preset: str, weights: Path, device: torch.device) -> nn.ModuleDict:
    """Upstream's ``backbone`` and ``head`` of a preset, with their weights; the any-view branch of a nested one.

    The file's names are those of ``api.DepthAnything3``. Parts that do not run are built for their names alone.
    """
    config = load_config(MODEL_REGISTRY[preset])
    nested = "anyview" in config
    branch, prefix = (config.anyview, "model.da3.") if nested else (config, "model.")
    with init_empty_weights():
        network = nn.ModuleDict({"backbone": create_object(branch.net), "head": create_object(branch.head)})
        others = {
            prefix + part: create_object(branch[part]) for part in ("cam_enc", "cam_dec", "gs_head") if part in branch
        }
        if nested:
            others["model.da3_metric"] = create_object(config.metric)
    unused = {f"{part}.{name}" for part, module in others.items() for name in module.state_dict()}
    load_weights(network, weights, prefix=prefix, unused=unused, device=device)
    return network


def _da3_version() -> str:
    return importlib.metadata.version("depth-anything-3")
