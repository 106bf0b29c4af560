"""Pi0 and Pi0.5 with geometry: what the two share, on PaliGemma.

The alignment loss reads the image tokens' hidden states, through the seam in `image_tokens`.
"""

import contextlib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lerobot.policies.pi05.modeling_pi05 import get_gemma_config
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from torch import Tensor, nn

from geomcache.errors import UserInputError
from geomcache.geometry import Geometry
from geomcache.policy.alignment import Alignment, GeometryProjector
from geomcache.policy.geometry_policy import TOKENS_KEY, GeometryPolicy
from geomcache.policy.gradients import compare_gradients, shared_parameters
from geomcache.policy.image_tokens import HiddenStates, picture_areas, tokens_of_views
from geomcache.policy.paligemma_options import PaliGemmaOptions
from geomcache.policy.prefix import ExtendedPrefix, PrefixInputs, with_tokens
from geomcache.policy.small_paligemma import SMALL_GEMMA, SmallPaliGemmaWithExpert


class PaliGemmaNetwork(ExtendedPrefix):
    """What LeRobot's networks of Pi0 and Pi0.5 inherit first.

    Attributes:
        geometry_projector: only with the alignment loss.
        hidden_states: keeps the hidden states that are aligned; None without the alignment loss.
    """

    small_class: ClassVar[type[SmallPaliGemmaWithExpert]]
    """LeRobot's pair of language model and action expert, in the small size."""

    def __init__(self, config: PaliGemmaOptions, rtc_processor: RTCProcessor | None = None) -> None:
        if config.model_size == "small":
            with torch.device("meta"):  # shapes without memory: what depends on the size is replaced at once
                super().__init__(config, rtc_processor)
            self.paligemma_with_expert = self.small_class(config)
            for name, layer in self.small_layers(config, SMALL_GEMMA.width).items():
                setattr(self, name, layer)
            width = SMALL_GEMMA.width
        else:
            super().__init__(config, rtc_processor)
            width = get_gemma_config(config.paligemma_variant).width
        self.add_adapter(config, width)
        self.hidden_states: HiddenStates | None = None
        if config.is_aligned:
            self.geometry_projector = GeometryProjector(statistics=config.geometry_statistics, width=width)
            self.hidden_states = HiddenStates(self.paligemma_with_expert, [config.align_layer])

    @staticmethod
    def small_layers(config: Any, width: int) -> dict[str, nn.Module]:
        """Return the other layers whose shapes depend on the size, by name, for hidden states of this width."""
        raise NotImplementedError


class PaliGemmaPolicy(GeometryPolicy):
    """What LeRobot's policies Pi0 and Pi0.5 inherit first.

    Attributes:
        measures_gradients: the next training step compares the gradients of both losses; false, set by the trainer.
    """

    measures_gradients = False

    def prepare_network(self) -> None:
        """Do what LeRobot's constructor does to a new network."""
        if self.config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.to(self.config.device)

    def loss_with_geometry(
        self, batch: dict[str, Any], geometry: Geometry, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the action loss and, where the policy is aligned, the alignment loss added to it.

        Raises:
            UserInputError: the alignment loss would train its projector alone.
        """
        states: HiddenStates | None = self.model.hidden_states
        if not self.config.is_aligned or states is None:
            return super().loss_with_geometry(batch, geometry, *args, **kwargs)
        with states.kept() as hidden:
            loss, numbers = super().loss_with_geometry(batch, geometry, *args, **kwargs)
        return self._with_alignment(loss, numbers, hidden[self.config.align_layer], batch, geometry)

    def _with_alignment(
        self, loss: Tensor, numbers: dict[str, Any], hidden: Tensor, batch: Mapping[str, Any], geometry: Geometry
    ) -> tuple[Tensor, dict[str, Any]]:
        """Add the alignment loss to the action loss, [] or [B], and its numbers to those for the log."""
        weight, trains = self.config.geom_align_weight, self.training and torch.is_grad_enabled()
        if trains and not (shared := shared_parameters(self.model.paligemma_with_expert, self.config.align_layer)):
            raise UserInputError(
                f"geom_mode: expected trained parameters in the first {self.config.align_layer} layers of PaliGemma or"
                f" its vision tower for {self.config.geom_mode}, found none: the alignment loss would train its"
                " projector alone: add modules of PaliGemma to --peft.target_modules"
            )
        with contextlib.nullcontext() if weight else torch.no_grad():
            alignment = self._align(hidden, batch, geometry)
        measured = {
            "geom_action_loss": loss.detach().mean(),
            "geom_align_loss": alignment.losses.detach().mean(),
            "geom_align_r2": alignment.r2,
        }
        if trains and weight and self.measures_gradients:
            names = ("geom_action_grad", "geom_align_grad", "geom_grad_angle")
            compared = compare_gradients(loss.mean(), weight * alignment.losses.mean(), shared)
            measured |= dict(zip(names, compared, strict=True))
        if self.training and weight:
            loss = loss + weight * (alignment.losses if loss.ndim else alignment.losses.mean())
        values = torch.stack([number.float() for number in measured.values()]).tolist()  # one transfer
        logged = dict(zip(measured, values, strict=True))
        total = logged["geom_action_loss"] + (weight * logged["geom_align_loss"] if self.training else 0)
        return loss, numbers | {"loss": total} | logged

    def _align(self, hidden: Tensor, batch: Mapping[str, Any], geometry: Geometry) -> Alignment:
        assert self._spec is not None
        keys, side = self._spec.camera_keys, self.config.image_resolution[0]
        target = self.model.geometry_projector.target(geometry, picture_areas(batch, keys, side))
        present = [key for key in self.config.image_features if key in batch]  # in LeRobot's order
        alignment: Alignment = self.model.geometry_projector.align(tokens_of_views(hidden, keys, present, side), target)
        return alignment

    def completed_weights(self, loaded: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of a file by the names of `state_dict`; LeRobot renames those of older checkpoints."""
        fixed: dict[str, Tensor] = self._fix_pytorch_state_dict_keys(loaded, self.config)
        return {key if key.startswith("model.") else f"model.{key}": value for key, value in fixed.items()}

    def _get_default_peft_targets(self) -> dict[str, Any]:
        """Return LeRobot's LoRA targets; the added parts are trained in full and saved with them.

        LeRobot's targets are in the action expert, which the alignment loss does not reach: with it, the same
        projections of the language model's layers are targets too.
        """
        targets = super()._get_default_peft_targets()
        if self.config.is_aligned:
            language = r".*\.paligemma\.model\.language_model\..*\.self_attn\.(q|v)_proj"
            targets["target_modules"] = f"({targets['target_modules']}|{language})"
        return targets

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return actions [B, chunk, action dim] of a batch that brings its geometry, or pictures to encode.

        Args:
            batch: an observation, as LeRobot's preprocessor leaves it.
            args: LeRobot's.
            kwargs: LeRobot's, for real-time chunking.

        Raises:
            GeometryError: geometry or pictures do not fit what the policy was trained with.
            ModelError: the DA3 that the policy was trained with is not available.
        """
        self.eval()
        chunk: Tensor = super().predict_action_chunk(self.with_tokens_to_act(batch), *args, **kwargs)
        return chunk

    def _preprocess_images(
        self, batch: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[list[Tensor] | PrefixInputs, list[Tensor]]:
        """Prepare the pictures as LeRobot does, together with the batch's tokens."""
        images, img_masks = super()._preprocess_images(batch, *args, **kwargs)
        return with_tokens(images, batch.get(TOKENS_KEY)), img_masks
