"""Options of policies that rest on PaliGemma, Pi0 and Pi0.5: the alignment loss and the small size."""

import math
from dataclasses import dataclass

from geomcache.errors import UserInputError
from geomcache.geometry import PATCH_SIZE
from geomcache.policy.options import MAX_ENLARGED_CELLS, MODES, GeometryOptions

LAYERS = {"full": 18, "small": 4}  # of PaliGemma's language model
MODEL_SIZES = tuple(LAYERS)


@dataclass
class PaliGemmaOptions(GeometryOptions):
    """Options of `pi0_geometry` and `pi05_geometry`, in front of LeRobot's own."""

    geom_mode: str = "prefix"
    """``prefix``: geometry is tokens of the prefix. ``align``: geometry is a loss while training, there are no tokens,
    and DA3 is not needed to act. ``both``: tokens and loss."""

    geom_align_weight: float = 0.5
    """Factor of the alignment loss. 0: it is measured and changes nothing."""

    geom_align_layer: int | None = None
    """Layer of PaliGemma, from 1, after which image tokens are aligned. None: two thirds of the layers, 12 of 18."""

    model_size: str = "full"
    """``full``: the published size. ``small``: the same classes with 2.7 million parameters, for tests and
    demonstrations; use it with a small `image_resolution` such as 112x112."""

    tokenizer_name: str | None = None
    """Tokenizer of newly made processors: a Hub id or a folder, or ``bytes``, a built-in one that needs no file. None:
    PaliGemma's for ``full`` (gated on the Hub), ``bytes`` for ``small``. A checkpoint's processors bring their own."""

    def check_options(self) -> None:
        """Check the options above too.

        Raises:
            UserInputError: an option cannot be used.
            CacheFormatError: the spec is malformed.
        """
        if self.model_size not in MODEL_SIZES:
            raise UserInputError(f"model_size: expected {' or '.join(map(repr, MODEL_SIZES))}, got {self.model_size!r}")
        if self.model_size == "small" and any(side % PATCH_SIZE for side in self.image_resolution):
            raise UserInputError(
                f"image_resolution: expected multiples of {PATCH_SIZE}, such as [112,112], got {self.image_resolution}"
            )
        if self.geom_mode not in MODES:
            raise UserInputError(f"geom_mode: expected {', '.join(MODES)}, got {self.geom_mode!r}")
        super().check_options()
        self._check_alignment()

    def validate_features(self) -> None:
        """Check all options; LeRobot calls this when it builds the policy.

        Raises:
            UserInputError: an option cannot be used, or pictures that would be aligned are none of the policy's.
        """
        super().validate_features()
        spec = self.geometry_spec
        unseen = [] if spec is None else [key for key in spec.camera_keys if key not in self.image_features]
        if unseen and self.is_aligned:
            raise UserInputError(
                f"geom_mode: expected prefix for a policy that does not see {', '.join(unseen)} of the cache, got"
                f" {self.geom_mode}: there are no image tokens to align: give the policy the camera, or extract a cache"
                " without it"
            )

    @property
    def needs_pretrained(self) -> bool:
        """Whether weights must be given, because random ones were not asked for."""
        return self.model_size == "full" and not self.random_init

    @property
    def parts(self) -> frozenset[str]:
        """Names of the modules that geometry adds to the network."""
        return MODES[self.geom_mode] if self.use_geom_prefix else frozenset()

    @property
    def align_layer(self) -> int:
        """Layer of PaliGemma, from 1, after which image tokens are aligned."""
        return self.geom_align_layer or round(LAYERS[self.model_size] * 2 / 3)

    def _check_alignment(self) -> None:
        if not 0 <= self.geom_align_weight < math.inf:
            raise UserInputError(f"geom_align_weight: expected a number of at least 0, got {self.geom_align_weight}")
        layers = LAYERS[self.model_size]
        if self.geom_align_layer is not None and not 1 <= self.geom_align_layer <= layers:
            raise UserInputError(
                f"geom_align_layer: expected 1 to {layers}, the layers of model_size={self.model_size}, got"
                f" {self.geom_align_layer}"
            )
        if not self.is_aligned:
            return
        if self.train_expert_only:
            raise UserInputError(
                f"train_expert_only: expected false with geom_mode={self.geom_mode}, got true: the alignment loss"
                " reaches the vision tower and the language model, which would not be trained"
            )
        spec, side = self.geometry_spec, self.image_resolution[0] // PATCH_SIZE
        if spec is not None and side > min(spec.grid_hw) + MAX_ENLARGED_CELLS:
            raise UserInputError(
                f"geom_mode: expected a cached grid of at least {side - MAX_ENLARGED_CELLS} cells a side for"
                f" {self.geom_mode}, as a picture has {side}x{side} image tokens, the cache has"
                f" {spec.grid_hw[0]}x{spec.grid_hw[1]}: extract on a finer grid, or use geom_mode=prefix"
            )
