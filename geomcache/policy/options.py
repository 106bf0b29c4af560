"""Options that geometry adds to a policy, and what its geometry was made from.

Geometry reaches a policy in two ways, each with a part of its own in the network: tokens of the prefix, made by the
adapter, and a loss while training, with a projector.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from geomcache.adapter import GEOMETRY_ATTENTION
from geomcache.errors import CacheMismatchError, UserInputError
from geomcache.geometry import GeometrySpec, differences
from geomcache.policy.lerobot_version import warn_if_untested
from geomcache.statistics import Moments

LeRobotClass: Any = object
"""Base of what is put in front of a class of LeRobot: its `super()` is that class, which mypy does not know."""

SUFFIX = "_geometry"  # of a policy's type, after LeRobot's name of the plain one
LEROBOT_MEMORY = ("use_visual_memory", "use_proprioceptive_memory")  # options of LeRobot after 0.6.1
ADAPTER_NAME = "geometry_adapter"  # of the modules in the network
PROJECTOR_NAME = "geometry_projector"
PARTS = {ADAPTER_NAME: "geometry adapter", PROJECTOR_NAME: "geometry projector"}  # what messages call them
MODES = {
    "prefix": frozenset({ADAPTER_NAME}),
    "align": frozenset({PROJECTOR_NAME}),
    "both": frozenset({ADAPTER_NAME, PROJECTOR_NAME}),
}
"""The parts that each `geom_mode` has."""
ENGINES = ("eager", "compiled")  # as geomcache.da3.engine.EngineName, which is not imported for training
# Enlarging invents nothing: a target grid may be finer than the cached one by a rounding difference, not by more.
MAX_ENLARGED_CELLS = 4


@dataclass
class GeometryOptions(LeRobotClass):  # type: ignore[misc]
    """Options of a policy with geometry tokens, in front of LeRobot's own. Written into ``config.json``."""

    plain_name: ClassVar[str]
    """What people call the policy without geometry."""

    published: ClassVar[str]
    """A checkpoint of it on the Hub to start from."""

    use_geom_prefix: bool = True
    """Off: LeRobot's own policy, bit for bit; no part is added."""

    geom_model_id: str | None = None
    """The DA3 that the online encoder loads: a name, a Hub id or a folder, with the weights of the cache's. None: the
    cache's name."""

    geom_engine: str = "eager"
    """How the online encoder runs DA3. ``compiled``: faster, after 10 to 30 s of compiling at the first prediction; for
    evaluations and robots that predict often."""

    geom_target_hw: tuple[int, int] = (14, 14)
    """Token grid (h, w) of each view; ``[14,14]`` on the command line."""

    geom_init_alpha: float = 0.1
    """Initial value of the learned scale of the geometry tokens."""

    freeze_geom_model: bool = True
    """False is refused: a cache has no gradient to DA3."""

    geom_attention: str = "full"
    """``full``: all prefix tokens see each other. ``isolated``: image and text do not see geometry, actions see all."""

    geom_lr_scale: float = 10.0
    """Learning rate of adapter and projector divided by the policy's."""

    geom_modality_embedding: bool = False
    """A learned embedding for each view, added to its tokens."""

    random_init: bool = False
    """Allow a model to start from random weights, without `pretrained_path`."""

    geom_spec: dict[str, Any] | None = None
    """What the geometry was made from (`GeometrySpec.to_dict`); set from the cache, not by hand."""

    geom_statistics: dict[str, Any] | None = None
    """Moments of each cached output (`Moments.to_dict`) that the adapter standardises by; set from the cache."""

    geom_fingerprint: str | None = None
    """Fingerprint of the cache that the policy was last trained from."""

    def __post_init__(self) -> None:
        warn_if_untested()  # before LeRobot's model is imported, which a version that moved it would fail at
        super().__post_init__()

    def check_options(self) -> None:
        """Check the options above, when a cache is bound and when the policy is built.

        The constructor does not check them: LeRobot's command line hides why a constructor refuses a value.

        Raises:
            UserInputError: an option cannot be used.
            CacheFormatError: the spec is malformed.
        """
        if not self.freeze_geom_model:
            raise UserInputError(
                "freeze_geom_model: expected true, got false: a cache has no gradient to DA3, it cannot be trained here"
            )
        for name in LEROBOT_MEMORY:
            if getattr(self, name, False):
                raise UserInputError(
                    f"{name}: expected false, got true: geometry is that of the current frame, and {self.type} was"
                    f" not made for a history of frames: leave it out, or train LeRobot's {self.plain_type} with it"
                )
        if self.geom_attention not in GEOMETRY_ATTENTION:
            raise UserInputError(
                f"geom_attention: expected {' or '.join(map(repr, GEOMETRY_ATTENTION))}, got {self.geom_attention!r}"
            )
        if self.geom_engine not in ENGINES:
            raise UserInputError(f"geom_engine: expected {' or '.join(map(repr, ENGINES))}, got {self.geom_engine!r}")
        if not all(1 <= cells <= 9999 for cells in self.geom_target_hw):
            raise UserInputError(f"geom_target_hw: expected 1 to 9999 cells a side, got {self.geom_target_hw}")
        if not math.isfinite(self.geom_init_alpha):
            raise UserInputError(f"geom_init_alpha: expected a finite number, got {self.geom_init_alpha}")
        if not 0 < self.geom_lr_scale < math.inf:
            raise UserInputError(f"geom_lr_scale: expected a positive number, got {self.geom_lr_scale}")
        self._check_target_grid()

    def validate_features(self) -> None:
        """Check all options; LeRobot calls this when it builds the policy.

        Raises:
            UserInputError: an option cannot be used.
        """
        self.check_options()
        super().validate_features()

    @property
    def plain_type(self) -> str:
        """LeRobot's name of the policy without geometry."""
        own: str = self.type
        return own.removesuffix(SUFFIX)

    @property
    def needs_pretrained(self) -> bool:
        """Whether weights must be given, because random ones were not asked for."""
        return not self.random_init

    @property
    def parts(self) -> frozenset[str]:
        """Names of the modules that geometry adds to the network."""
        return MODES["prefix"] if self.use_geom_prefix else frozenset()

    @property
    def has_tokens(self) -> bool:
        """Whether the prefix has geometry tokens: the policy needs geometry to act."""
        return ADAPTER_NAME in self.parts

    @property
    def is_aligned(self) -> bool:
        """Whether training has the alignment loss."""
        return PROJECTOR_NAME in self.parts

    @property
    def geometry_spec(self) -> GeometrySpec | None:
        """Settings that the geometry was made with; None before a cache is bound.

        Raises:
            CacheFormatError: the checkpoint's spec is malformed.
        """
        return None if self.geom_spec is None else GeometrySpec.from_dict(self.geom_spec)

    @property
    def geometry_statistics(self) -> dict[str, Moments]:
        """Moments of the spec's outputs, in their order.

        Raises:
            CacheFormatError: the checkpoint's statistics are malformed or missing.
        """
        spec = self.geometry_spec
        assert spec is not None
        statistics = self.geom_statistics or {}
        return {name: Moments.from_dict(statistics.get(name), name) for name in spec.outputs}

    def bind_cache(self, spec: GeometrySpec, statistics: Mapping[str, Moments], fingerprint: str) -> None:
        """Take over a cache's spec, statistics and fingerprint, before the policy is made.

        A configuration that has a spec already comes from a checkpoint: its adapter was trained with that geometry, so
        the cache must have been made in the same way, and the checkpoint's statistics stay.

        Args:
            spec: the cache's spec, its cameras under the names that the policy sees.
            statistics: the cache's moments of each of the spec's outputs.
            fingerprint: the cache's fingerprint.

        Raises:
            CacheMismatchError: a field of the checkpoint's spec differs.
            UserInputError: an option cannot be used, or `geom_target_hw` is larger than the cached grid by more than
                4 cells.
        """
        if self.geom_spec is None:
            self.geom_spec = spec.to_dict()
            self.geom_statistics = {name: statistics[name].to_dict() for name in spec.outputs}
        else:
            check_same_spec(cached=spec.to_dict(), checkpoint=self.geom_spec)
        self.geom_fingerprint = fingerprint
        self.check_options()

    def forget_geometry(self) -> None:
        """Drop spec, statistics and fingerprint: there is no trained adapter that they belong to."""
        self.geom_spec = self.geom_statistics = self.geom_fingerprint = None

    def _check_target_grid(self) -> None:
        spec = self.geometry_spec
        if spec is None or not self.has_tokens:
            return
        for target, cached in zip(self.geom_target_hw, spec.grid_hw, strict=True):
            if target > cached + MAX_ENLARGED_CELLS:
                raise UserInputError(
                    f"geom_target_hw: expected at most {MAX_ENLARGED_CELLS} cells a side more than the cached grid"
                    f" {spec.grid_hw[0]}x{spec.grid_hw[1]}, got {self.geom_target_hw[0]}x{self.geom_target_hw[1]}:"
                    " choose a smaller one, or extract on a finer grid"
                )


def as_geometry_config(config: Any) -> Any:
    """Return the configuration of a plain policy as one of ours with geometry switched off; ours as it is."""
    if isinstance(config, GeometryOptions):
        return config
    plain = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return geometry_config_class(config.type)(**plain, use_geom_prefix=False)


def geometry_config_class(plain_type: str) -> Any:
    """Return the configuration class of LeRobot's policy of this name with geometry."""
    from lerobot.configs import PreTrainedConfig

    return PreTrainedConfig.get_choice_class(f"{plain_type}{SUFFIX}")


def check_same_spec(*, cached: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
    """Compare the spec of a cache with the spec that a checkpoint was trained with. The model's name is a label.

    Raises:
        CacheMismatchError: a field differs.
    """
    for field, cached_value, trained_value in differences(cached, checkpoint):
        if field != "model_id":
            advice = "extract a cache with the checkpoint's settings, or start from a checkpoint without geometry"
            if field == "cameras":
                advice = _rename_advice(cached_value, trained_value) or advice
            raise CacheMismatchError(
                f"spec.{field}: expected {trained_value!r}, which the checkpoint was trained with, the cache has"
                f" {cached_value!r}: {advice}",
                f"spec.{field}",
                cached_value,
                trained_value,
            )


def _rename_advice(cached: Any, trained: Any) -> str:
    """Return what to do where cameras differ in nothing but their names, else nothing."""
    cached_sizes, trained_sizes = ([(c["height"], c["width"]) for c in cameras] for cameras in (cached, trained))
    if cached_sizes != trained_sizes:
        return ""
    names = {c["key"]: t["key"] for c, t in zip(cached, trained, strict=True) if c["key"] != t["key"]}
    return (
        "give the dataset's cameras the checkpoint's names with --policy.path=CHECKPOINT"
        f" --rename_map='{json.dumps(names)}'"
    )
