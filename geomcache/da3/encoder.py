"""DA3Encoder: images -> Geometry, with Depth Anything 3's own network and preprocessing. Only this room imports it.

Legend:  B frames   V views   N, S batch and views as the network sees them   H, W pixels   h, w grid   C channels

The network is upstream's backbone and head, called as ``DepthAnything3Net.forward`` calls them: the whole of that
function deletes the rays. ``joint``: the V views of a frame are one scene (N = B, S = V), and the first is the
reference. ``independent``: every image is a scene of its own (N = B*V, S = 1). Frames are never views of one another.

The head's maps are averaged over the cells of the spec's grid, in float32, as they are: directions are not normalised
before or after, confidences are not taken as logarithms. Then they are rounded to float16, saturating.

The output ``feature`` is what the head sees of the backbone's last layer, projected by a basis (`feature_basis`) and
averaged in the same way: 2,048 numbers a patch of DA3-LARGE are too many to be cached.
"""

import copy
import dataclasses
import hashlib
import importlib.metadata
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from accelerate import init_empty_weights
from depth_anything_3.cfg import create_object, load_config
from depth_anything_3.registry import MODEL_REGISTRY
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from geomcache.da3.catalog import find_model
from geomcache.da3.checks import (
    Images,
    check_device,
    check_feature_grid,
    check_same,
    choose_grid_hw,
    raise_nan,
)
from geomcache.da3.engine import EngineName, NetworkForward, is_out_of_memory
from geomcache.da3.preprocess import DA3Preprocessor, NetworkInput, normalise
from geomcache.da3.weights import load_weights, sha256
from geomcache.errors import GeometryError, ModelError, UserInputError
from geomcache.geometry import (
    DEFAULT_OUTPUTS,
    FEATURE,
    FLOAT16_MAX,
    Camera,
    ComputeDtype,
    FeatureSpec,
    Geometry,
    GeometrySpec,
    Views,
)

RESIZE_METHOD, REFERENCE_VIEW = GeometrySpec.resize_method, GeometrySpec.reference_view  # the only ones in use


class PendingGeometry:
    """Geometry that the device is still computing."""

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
        """Wait for the geometry; return and raise what `DA3Encoder.forward` does, on the CPU."""
        if self._done is not None:
            self._done.synchronize()
        raise_nan(self._nan, list(self._maps), self._camera_keys)
        return Geometry(**self._maps)


class DA3Encoder:
    """Depth Anything 3 with fixed settings: images of B frames -> their geometry.

    It is not an ``nn.Module``, which keeps it out of the parameters and checkpoints of a policy that holds it.
    """

    _basis: Tensor | None = None  # of the features, float32 [width, D] on the device

    def __init__(
        self, spec: GeometrySpec, preprocessor: DA3Preprocessor, network: nn.ModuleDict, device: torch.device
    ) -> None:
        self.spec = spec
        self.device = device
        self.preprocessor = preprocessor
        self.calls = 0
        """How often `forward` ran."""
        self._network = network
        self._forward = NetworkForward(network, device, spec.compute_dtype)
        self._batch_frames = 0  # of every call of a compiled network; fewer are padded
        self._copies: torch.cuda.Stream | None = None

    @property
    def feature_width(self) -> int:
        """Return how many numbers the backbone gives a patch."""
        network: Any = self._network["backbone"].pretrained
        return int(network.embed_dim * (2 if network.cat_token else 1))

    @property
    def feature_basis(self) -> NDArray[np.float32] | None:
        """Return the basis of the output ``feature``, [width, D]; None without this output."""
        return None if self._basis is None else self._basis.cpu().numpy()

    @property
    def engine(self) -> EngineName:
        """Return what runs the network."""
        return self._forward.engine

    @property
    def device_name(self) -> str:
        """Return the kind of device: a GPU's name, or ``CPU``."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return self.device.type.upper()

    def compile(self, frames: int) -> float:
        """Compile the network for batches of this many frames, and run one; from now on, smaller ones are padded to it.

        If compilation fails, the log says so, and the network runs as before.

        Returns:
            The seconds that it took.

        Raises:
            RuntimeError: the device lacks the memory for such a batch.
        """
        began = time.perf_counter()
        self._forward.compile()
        self._batch_frames = frames
        pictures = [np.zeros((frames, camera.height, camera.width, 3), np.uint8) for camera in self.spec.cameras]
        self.launch(self.preprocess(pictures)).result()
        self.calls -= 1
        return time.perf_counter() - began

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
            outputs: ``ray`` and any other of `OUTPUTS` but ``feature``, which `with_feature` adds. The head takes about
                half the time without depth.
            device: None for CUDA if there is one, otherwise the CPU.
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
        cls,
        spec: GeometrySpec,
        *,
        model: str | None = None,
        device: str | torch.device | None = None,
        feature_basis: NDArray[np.float32] | None = None,
    ) -> Self:
        """Build the encoder of a cache.

        Args:
            spec: the cache's.
            model: where to look for the weights, instead of the spec's model and revision.
            device: as in `from_pretrained`.
            feature_basis: the cache's, where the spec has features.

        Raises:
            ModelError: the weights are missing, or not those of the spec.
            GeometryError: the basis is not the spec's.
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
        geometry = spec.without_feature()
        encoder = cls(geometry, preprocessor, _load_network(files.preset, files.weights, where), where)
        if feature_basis is not None:
            encoder = encoder.with_feature(feature_basis)
        if encoder.spec.feature != spec.feature:
            raise GeometryError(
                f"feature basis: expected that of the cache, {spec.feature}, got {encoder.spec.feature}: give"
                " GeometryStore.feature_basis"
            )
        return encoder

    def with_grid(self, grid: str) -> Self:
        """Return an encoder with the same network and settings and another output grid. It counts its own calls.

        Raises:
            UserInputError: the grid cannot be used with these cameras.
        """
        spec = dataclasses.replace(self.spec, grid=grid)
        spec = dataclasses.replace(spec, grid_hw=choose_grid_hw(spec, self.preprocessor.sizes))
        other = copy.copy(self)
        other.spec, other.calls = spec, 0
        return other

    def with_feature(self, basis: NDArray[np.float32]) -> Self:
        """Return an encoder with the same network and settings and the output ``feature``. It counts its own calls.

        Args:
            basis: float32 [width, D], orthonormal columns: see `feature_basis.FeatureMoments`.

        Raises:
            UserInputError: the basis has more columns than can be, or the grid is finer than the patches.
        """
        values = np.ascontiguousarray(basis, "<f4")
        if values.ndim != 2 or len(values) != self.feature_width:
            raise UserInputError(f"feature basis: expected [{self.feature_width}, D], got {[*values.shape]}")
        check_feature_grid(self.spec.grid, self.preprocessor.sizes)
        digest = hashlib.sha256(values.tobytes()).hexdigest()
        feature = FeatureSpec(width=len(values), dim=values.shape[1], basis_sha256=digest)
        outputs = self.spec.without_feature().outputs
        other = copy.copy(self)
        other.spec = dataclasses.replace(self.spec, outputs=(*outputs, FEATURE), feature=feature)
        other._basis, other.calls = torch.tensor(values, device=self.device), 0
        return other

    def raw_features(self, inputs: NetworkInput) -> Tensor:
        """Return the backbone's features of B preprocessed frames, float32 [cells of all frames and views, width].

        They are averaged over the cells of the spec's grid, and not projected.

        Raises:
            GeometryError: shapes are not those of `preprocess`.
        """
        self._check_inputs(inputs)
        parts = [view[:, None] for view in inputs] if isinstance(inputs, list) else [inputs]
        features = [self._averaged(part, (FEATURE,), basis=None)[FEATURE].flatten(0, -2) for part in parts]
        return torch.cat(features)

    def preprocess(self, images: Images) -> NetworkInput:
        """Resize images to the network's input, as `DA3Preprocessor` does."""
        return self.preprocessor(images)

    def encode(self, images: Images) -> Geometry:
        """Return the geometry of B frames from their images: `preprocess`, then `forward`."""
        return self.forward(self.preprocess(images))

    def forward(self, inputs: NetworkInput) -> Geometry:
        """Return the geometry of B preprocessed frames.

        Args:
            inputs: from `preprocess`, on any device.

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
        """Start `forward` without waiting for the device: you can launch the next batch before you read this one.

        Raises:
            GeometryError: shapes are not those of `preprocess`.
        """
        return PendingGeometry(*self._compute(inputs), self.spec.camera_keys)

    def _compute(self, inputs: NetworkInput) -> tuple[dict[str, Tensor], Tensor]:
        """Return each output's rounded maps [B, V, h, w, ...], and whether each has a NaN, bool [B, V, outputs]."""
        self._check_inputs(inputs)
        self.calls += 1
        if isinstance(inputs, list):
            parts = [self._maps(view[:, None]) for view in inputs]  # [B, 1, h, w, ...] each
            maps = {name: torch.cat([part[name] for part in parts], dim=1) for name in self.spec.outputs}
        else:
            maps = self._maps(inputs)
        rounded = {
            name: values.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16, memory_format=torch.contiguous_format)
            for name, values in maps.items()
        }
        return rounded, torch.stack([values.isnan().flatten(2).any(-1) for values in rounded.values()], dim=-1)

    def _upload(self, images: Tensor) -> Tensor:
        """Return the images on the device. Page-locked ones are copied while the device computes the batch before."""
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

    def _maps(self, pictures: Tensor) -> dict[str, Tensor]:
        """Compute uint8 [B, V, H, W, 3] -> float32 [B, V, h, w, ...] of each output, on the spec's grid."""
        return self._averaged(pictures, self.spec.outputs, self._basis)

    def _averaged(self, pictures: Tensor, outputs: Sequence[str], basis: Tensor | None) -> dict[str, Tensor]:
        """Return these outputs on the spec's grid; features in the numbers of a basis, or as they are without one."""
        batch, views = pictures.shape[:2]
        images = normalise(self._upload(pictures))  # [B, V, 3, H, W]
        if self.engine == "compiled":
            self._batch_frames = max(self._batch_frames, batch)
            missing = self._batch_frames - batch
            images = torch.cat([images, images[-1:].expand(missing, -1, -1, -1, -1)]) if missing else images
        scenes = images if self.spec.views == "joint" else images.flatten(0, 1)[:, None]
        try:
            maps = self._forward(scenes, outputs)
        except RuntimeError as error:
            if is_out_of_memory(error):
                self._batch_frames = 0  # the next batch, a smaller one, sets the shape anew
            raise
        if FEATURE in outputs and basis is not None:
            maps[FEATURE] = maps[FEATURE] @ basis
        averaged = {name: _average(maps[name], self.spec.grid_hw) for name in outputs}  # [N, S, h, w, ...]
        return {name: values.reshape(-1, views, *values.shape[2:])[:batch] for name, values in averaged.items()}

    def _check_inputs(self, inputs: NetworkInput) -> None:
        sizes = self.preprocessor.sizes
        one_size = len(set(sizes)) == 1
        tensors = [inputs] if isinstance(inputs, Tensor) else inputs
        found = [list(view.shape) for view in tensors]
        batch = found[0][0] if found and found[0] else 0
        expected = [[batch, len(sizes), *sizes[0], 3]] if one_size else [[batch, *size, 3] for size in sizes]
        right_type = isinstance(inputs, Tensor) == one_size and all(view.dtype == torch.uint8 for view in tensors)
        if not right_type or found != expected or batch == 0:
            raise GeometryError(
                f"inputs: expected what preprocess gives, uint8 {expected}, got"
                f" {', '.join(f'{view.dtype} {shape}' for view, shape in zip(tensors, found, strict=True))}"
            )


def _average(values: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Average [N, S, h', w'] or [N, S, h', w', C] over the cells under each cell of `grid_hw`."""
    if values.shape[2:4] == grid_hw:
        return values
    if values.ndim == 4:
        return adaptive_avg_pool2d(values, grid_hw)
    averaged = adaptive_avg_pool2d(values.flatten(0, 1).movedim(-1, 1), grid_hw)  # [N*S, C, h, w]
    return averaged.movedim(1, -1).reshape(*values.shape[:2], *grid_hw, values.shape[-1])


def _load_network(preset: str, weights: Path, device: torch.device) -> nn.ModuleDict:
    """Load upstream's ``backbone`` and ``head`` of a preset with their weights; of a nested one, the any-view branch.

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
