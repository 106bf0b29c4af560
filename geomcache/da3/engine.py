"""How the network's forward runs: module by module (eager), or compiled by torch for one shape of batches.

Both compute in the same precision: ``bf16`` is autocast for the backbone with its residuals, norms and products of
rotations in float32, and TF32 in the head's convolutions on CUDA; ``fp32`` is float32 everywhere, so that a GPU agrees
with a CPU.
"""

import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from geomcache.da3.backbone import BlockForward, RotaryTables, backbone_forward, block_forward
from geomcache.da3.ray_head import ray_forward
from geomcache.errors import one_line
from geomcache.geometry import FEATURE, PATCH_SIZE, ComputeDtype

EngineName = Literal["eager", "compiled"]
HeadForward = Callable[[Any, list[Tensor], int, int], dict[str, Tensor]]

# A block is compiled for each way in which blocks differ (with and without rotations, one view or all) and each shape
# of a batch; torch's default of 8 would be reached by two cameras of different sizes.
_COMPILATIONS = 64

logger = logging.getLogger(__name__)


class NetworkForward:
    """Upstream's backbone and head with one engine.

    Attributes:
        engine: what runs. `compile` changes it, and so does a compilation that fails.
    """

    def __init__(self, network: nn.ModuleDict, device: torch.device, dtype: ComputeDtype) -> None:
        self.engine: EngineName = "eager"
        self._backbone, self._head = network["backbone"], network["head"]
        self._device, self._bf16 = device, dtype == "bf16"
        self._tables: dict[tuple[int, int], RotaryTables | None] = {}
        self._run_block: BlockForward = block_forward
        self._run_head: HeadForward = ray_forward
        self._proven: set[tuple[int, ...]] = set()  # shapes that the compiled forward has run
        if self._bf16:
            _cast_once(self._backbone)

    def compile(self) -> None:
        """Have torch compile each block and the ray head, for every shape when it is first run."""
        if self.engine == "eager":
            self._run_block = torch.compile(block_forward, dynamic=False)
            self._run_head = torch.compile(ray_forward, dynamic=False)
            self.engine = "compiled"

    def __call__(self, images: Tensor, outputs: Collection[str]) -> dict[str, Tensor]:
        """Compute the network's maps.

        Args:
            images: float32 [N, S, 3, H, W] on the device: N scenes of S views.
            outputs: which of `OUTPUTS` are needed; without depth, its chain is not run. ``feature`` is what the head
                sees of the last layer: upstream concatenates the features of each view alone and of the whole scene.

        Returns:
            float32 [N, S, h, w, ...] of each output, on the head's native grid, ``feature`` [N, S, H/14, W/14, C] on
            that of the patches; others of the head's outputs may come along.

        Raises:
            RuntimeError: the device is out of memory.
        """
        with torch.no_grad(), _numerics(tf32_convolutions=self._bf16):
            if self.engine == "eager":
                return self._run(images, outputs)
            shape = tuple(images.shape)
            try:
                with _compiling(quiet=shape not in self._proven):
                    maps = self._run(images, outputs)
            except Exception as error:
                if shape in self._proven or is_out_of_memory(error):
                    raise
                reason = f"{type(error).__name__}: {one_line(error)}"
            else:
                self._proven.add(shape)
                return maps
            # Outside of the handler, whose traceback holds memory.
            logger.warning("%s: compiling the encoder failed (%s): it runs eagerly, more slowly", self._device, reason)
            self.engine, self._run_block, self._run_head = "eager", block_forward, ray_forward
            return self._run(images, outputs)

    def _run(self, images: Tensor, outputs: Collection[str]) -> dict[str, Tensor]:
        height, width = images.shape[-2:]
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16):
            if (height, width) not in self._tables:  # made where upstream makes them: see backbone.py
                self._tables[height, width] = RotaryTables.make(self._backbone, height, width, images.device)
            features = backbone_forward(self._backbone, images, self._tables[height, width], self._run_block)
        with torch.autocast(self._device.type, enabled=False):
            maps: dict[str, Tensor]
            if not (of_head := set(outputs) - {FEATURE}):
                maps = {}
            elif of_head <= {"ray", "ray_conf"}:
                maps = self._run_head(self._head, features, height, width)
            else:
                maps = self._head([(feature,) for feature in features], height, width, patch_start_idx=0)
            if FEATURE in outputs:
                last = features[-1].float()  # [N, S, patches, C]
                patches = height // PATCH_SIZE, width // PATCH_SIZE
                maps = {**maps, FEATURE: last.reshape(*last.shape[:2], *patches, -1)}
            return maps


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says so: accelerators have a class for it, the CPU's allocator has words."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _cast_once(backbone: nn.Module) -> None:
    """Round the weights that autocast rounds to bfloat16 in every call, to the same numbers."""
    for module in backbone.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(torch.bfloat16)


@contextmanager
def _compiling(*, quiet: bool) -> Iterator[None]:
    """Run compiled functions with our limit, which is an error when it is reached; `quiet` for compiling itself."""
    limits = torch._dynamo.config.patch(recompile_limit=_COMPILATIONS, fail_on_recompile_limit_hit=True)
    with limits, warnings.catch_warnings():
        if quiet:
            # The compiler recommends TF32 matrix products, and warns of its own deprecated calls.
            warnings.simplefilter("ignore")
        yield


@contextmanager
def _numerics(*, tf32_convolutions: bool) -> Iterator[None]:
    """Set CUDA's switches as a cache's numbers need them, whatever a trainer has set, and restore them.

    LeRobot's training and evaluation turn on TF32 matrix products and cuDNN's benchmark mode: online geometry would not
    be what extraction computed.
    """
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_tf32
    matmul.allow_tf32 = False
    cudnn = torch.backends.cudnn
    try:
        with cudnn.flags(enabled=cudnn.enabled, benchmark=False, allow_tf32=tf32_convolutions):
            yield
    finally:
        matmul.allow_tf32 = allowed
