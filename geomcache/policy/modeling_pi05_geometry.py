"""The policy `pi05_geometry`: LeRobot's Pi0.5 with geometry tokens at the end of its prefix, or aligned to geometry.

    prefix   image tokens | text tokens, padded | geometry tokens       suffix   noisy actions

`embed_prefix` is the seam: LeRobot's `forward` and `sample_actions` both take the prefix from it, and derive position
ids (cumulative sum of the pad masks) and the attention mask from what it returns. The alignment loss reads the image
tokens' hidden states, through the seam in `image_tokens`. Everything else is inherited.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi05.modeling_pi05 import PI05Policy, PI05Pytorch, get_gemma_config
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from torch import Tensor

from geomcache.adapter import GeometryTokenAdapter, GeometryTokens
from geomcache.errors import GeometryError, ModelError, UserInputError
from geomcache.geometry import Geometry, batch_key
from geomcache.policy.alignment import Alignment, FeatureProjector, GeometryProjector
from geomcache.policy.checkpoint import adopt_geometry, checkpoint_file, load_weights, read_config, trained_parts
from geomcache.policy.configuration_pi05_geometry import PROJECTORS, PI05GeometryConfig
from geomcache.policy.gradients import compare_gradients, shared_parameters
from geomcache.policy.image_tokens import HiddenStates, picture_areas, tokens_of_views
from geomcache.policy.online import OnlineEncoder
from geomcache.policy.small_pi05 import SMALL_GEMMA, make_small

_TOKENS = "geometry_tokens"  # key of the batch between the policy and its network


class PrefixInputs(NamedTuple):
    """Pictures and the tokens that go with them.

    LeRobot's `forward` and `sample_actions` hand their first argument to `embed_prefix` and do nothing else with it.
    Tokens travel inside it and never wait in the network, which threads share: LeRobot evaluates tasks in parallel.
    """

    images: list[Tensor]  # [B, 3, H, W] of each camera, padding included
    extra: GeometryTokens


class PI05GeometryPytorch(PI05Pytorch):  # type: ignore[misc]  # LeRobot is not typed
    """LeRobot's Pi0.5 network with a prefix that can be extended by given tokens.

    Wherever it takes `images`, it also takes `PrefixInputs`.

    Attributes:
        geometry_adapter: only with geometry tokens.
        geometry_projector, feature_projector: one of them, only with the alignment loss.
        hidden_states: keeps the hidden states that are aligned; None without the alignment loss.
        image_token_norm: mean length of the image tokens in the last training step with extra tokens; logged.
    """

    def __init__(self, config: PI05GeometryConfig, rtc_processor: RTCProcessor | None = None) -> None:
        if config.model_size == "small":
            with torch.device("meta"):  # shapes without memory: what depends on the size is replaced at once
                super().__init__(config, rtc_processor)
            make_small(self, config)
            width = SMALL_GEMMA.width
        else:
            super().__init__(config, rtc_processor)
            width = get_gemma_config(config.paligemma_variant).width
        spec = config.geometry_spec
        if config.has_tokens:
            assert spec is not None
            self.geometry_adapter = GeometryTokenAdapter(
                statistics=config.geometry_statistics,
                views=len(spec.cameras),
                width=width,
                target_hw=config.geom_target_hw,
                init_alpha=config.geom_init_alpha,
                attention=config.geom_attention,
                modality_embedding=config.geom_modality_embedding,
            )
        self.hidden_states: HiddenStates | None = None
        if config.is_aligned:
            assert spec is not None
            if config.aligns_features:
                assert spec.feature is not None
                self.feature_projector = FeatureProjector(width, spec.feature.dim)
            else:
                self.geometry_projector = GeometryProjector(statistics=config.geometry_statistics, width=width)
            self.hidden_states = HiddenStates(self.paligemma_with_expert, [config.align_layer])
        self.image_token_norm: Tensor | None = None

    @property
    def projector(self) -> GeometryProjector | FeatureProjector:
        """Return the projector of the alignment loss, which the network must have."""
        name = PROJECTORS[self.config.geom_align_target]
        projector: GeometryProjector | FeatureProjector = getattr(self, name)
        return projector

    def embed_prefix(
        self, images: list[Tensor] | PrefixInputs, img_masks: list[Tensor], tokens: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embed LeRobot's prefix and append the extra tokens: embeddings [B, P, D], pad and attention masks [B, P].

        `args` and `kwargs` are LeRobot's: the masks of the text, and what a later version adds.
        """
        if not isinstance(images, PrefixInputs):
            plain: tuple[Tensor, Tensor, Tensor] = super().embed_prefix(images, img_masks, tokens, *args, **kwargs)
            return plain
        extra = images.extra
        embs, pad_masks, att_masks = super().embed_prefix(images.images, img_masks, tokens, *args, **kwargs)
        if self.training:
            image_tokens = embs.shape[1] - tokens.shape[1]
            # The pad mask leaves out empty cameras.
            self.image_token_norm = mean_length(embs[:, :image_tokens], pad_masks[:, :image_tokens])
        return (
            torch.cat([embs, extra.embs.to(embs.dtype)], dim=1),
            torch.cat([pad_masks, extra.pad_masks], dim=1),
            torch.cat([att_masks, extra.att_masks], dim=1),
        )

    def forward(
        self,
        images: list[Tensor] | PrefixInputs,
        *args: Any,
        extra_prefix_embs: Tensor | None = None,
        extra_prefix_pad_masks: Tensor | None = None,
        extra_prefix_att_masks: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return LeRobot's loss of each action dimension, with tokens at the end of the prefix.

        Args:
            images: [B, 3, H, W] of each camera.
            args: LeRobot's: img_masks, tokens, masks, actions, noise, time, and what a later version adds.
            extra_prefix_embs: [B, n, D]; the next two go with it.
            extra_prefix_pad_masks: [B, n] bool, false for padding.
            extra_prefix_att_masks: [B, n] bool, true where a block opens that earlier tokens do not see.
            kwargs: as args.
        """
        extra = _tokens(extra_prefix_embs, extra_prefix_pad_masks, extra_prefix_att_masks)
        losses: Tensor = super().forward(_with_tokens(images, extra), *args, **kwargs)
        return losses

    def sample_actions(
        self,
        images: list[Tensor] | PrefixInputs,
        *args: Any,
        extra_prefix_embs: Tensor | None = None,
        extra_prefix_pad_masks: Tensor | None = None,
        extra_prefix_att_masks: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return LeRobot's actions, with tokens at the end of the prefix, given as to `forward`."""
        extra = _tokens(extra_prefix_embs, extra_prefix_pad_masks, extra_prefix_att_masks)
        actions: Tensor = super().sample_actions(_with_tokens(images, extra), *args, **kwargs)
        return actions


class PI05GeometryPolicy(PI05Policy):  # type: ignore[misc]  # LeRobot is not typed
    """LeRobot's Pi0.5 policy with geometry: from the batch in training, from the batch or its pictures at inference.

    Attributes:
        allow_resize: accept pictures of another size than the cache was made of when encoding them; false.
        online: encodes pictures; None without geometry tokens. `online.encoder` is the DA3 encoder, once loaded.
        measures_gradients: the next training step compares the gradients of both losses; false, set by the trainer.
    """

    config_class = PI05GeometryConfig
    name = "pi05_geometry"

    def __init__(self, config: PI05GeometryConfig, *, weights_follow: bool = False, **_: Any) -> None:
        """Build the policy, with random weights.

        Args:
            config: with the spec and statistics of a cache (`bind_cache`); without `use_geom_prefix` they are dropped.
            weights_follow: the caller loads weights next; otherwise random ones must have been asked for.

        Raises:
            UserInputError: an option cannot be used, there is no spec, or random weights were not asked for.
            CacheFormatError: the configuration's spec or statistics are malformed.
        """
        config.validate_features()
        if not config.use_geom_prefix:
            config.forget_geometry()  # checkpoints of this policy have no adapter that spec and statistics belong to
        if not weights_follow and config.model_size == "full" and not config.random_init:
            raise UserInputError(
                "policy pi05_geometry: expected pretrained weights, got none: give --policy.pretrained_path, such as"
                " lerobot/pi05_base, or ask for random weights with --policy.random_init=true"
            )
        if config.use_geom_prefix and config.geom_spec is None:
            raise UserInputError(
                "policy pi05_geometry: expected the cache's spec in geom_spec, found none: train with `geomcache train"
                " --cache PATH`, load a pi05_geometry checkpoint, or set use_geom_prefix=false"
            )
        # Not the parent's constructor, which would build LeRobot's network first: 3.6 billion parameters for nothing.
        PreTrainedPolicy.__init__(self, config)
        self.init_rtc_processor()
        self.model = PI05GeometryPytorch(config, rtc_processor=self.rtc_processor)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.to(config.device)
        self.reset()
        self.allow_resize = False
        self.measures_gradients = False
        self._spec = config.geometry_spec
        self.online: OnlineEncoder | None = None
        if config.has_tokens:
            assert self._spec is not None
            self.online = OnlineEncoder(self._spec.without_feature(), config.geom_model_id, config.geom_engine)
        self._adapter_grad_norm: Tensor | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a checkpoint of `pi05_geometry`, or of plain `pi05` into a policy with fresh parts. Always strict.

        Args:
            pretrained_name_or_path: folder or Hub id.
            config: configuration of the run; None takes the checkpoint's own.
            force_download: download files again that are in the Hub's cache.
            token: token for gated and private checkpoints.
            cache_dir: folder that downloads are kept in.
            local_files_only: do not ask the Hub.
            revision: branch, tag or commit.
            kwargs: further arguments that LeRobot gives to a policy's constructor.

        Raises:
            ModelNotFoundError: the checkpoint, or a file of it, does not exist.
            ModelError: it is of another policy, or a key is missing, unexpected or of the wrong shape.
            CacheMismatchError: its geometry was made in another way than the run's.
        """
        path = str(pretrained_name_or_path)
        hub: dict[str, Any] = {
            "force_download": force_download,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "revision": revision,
        }
        saved = read_config(path, **hub)
        weights = checkpoint_file(path, SAFETENSORS_SINGLE_FILE, **hub)
        if config is None:
            config = PreTrainedConfig.from_pretrained(path, **hub)
        if not isinstance(config, PI05GeometryConfig):
            raise ModelError(
                f"policy {path}: expected a pi05_geometry configuration, got {config.type}: give config=, or load it"
                " with LeRobot's own policy class"
            )
        adopt_geometry(config, saved)
        policy = cls(config, weights_follow=True, **kwargs)
        load_weights(policy, path, weights, trained=trained_parts(saved))
        policy.eval()
        return policy

    def get_optim_params(self) -> Any:
        """Return the optimizer's parameters: the added parts in a group of their own, at its rate (`geom_lr_scale`)."""
        if not self.config.parts:
            return super().get_optim_params()
        added = [
            parameter for part in sorted(self.config.parts) for parameter in getattr(self.model, part).parameters()
        ]
        apart = {id(parameter) for parameter in added}
        return [
            {"params": [parameter for parameter in self.parameters() if id(parameter) not in apart]},
            {"params": added, "lr": self.config.optimizer_lr * self.config.geom_lr_scale},
        ]

    def forward(self, batch: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        """Return the loss of a batch that brings its geometry, and numbers for the log.

        Further arguments are LeRobot's. With geometry tokens, the numbers have ``geom_alpha``; ``geom_token_norm`` and
        ``image_token_norm``, mean lengths of the prefix's tokens; and ``geom_grad_norm``, the norm of the adapter's
        gradient in the step before, not clipped, of this process alone; it is missing in the first step. With the
        alignment loss, they have ``geom_action_loss``, ``geom_align_loss``, and ``geom_align_r2`` or, of features,
        ``geom_align_cosine``; where `measures_gradients` is set, also what `compare_gradients` returns. Held-out
        batches, of a policy in evaluation mode, have the action loss alone, which can be compared between modes.

        Raises:
            GeometryError: the batch has no geometry, or other outputs, views or grid than the policy was made for, or
                was cast to bfloat16.
            UserInputError: the alignment loss would train its projector alone.
        """
        if not self.config.parts:
            plain: tuple[Tensor, dict[str, Any]] = super().forward(batch, *args, **kwargs)
            return plain
        geometry = self._geometry_to_train_on(batch)
        tokens = self._tokens(geometry) if self.config.has_tokens else None
        given = batch if tokens is None else batch | {_TOKENS: tokens}
        states: HiddenStates | None = self.model.hidden_states
        if self.config.is_aligned and states is not None:
            with states.kept() as hidden:
                loss, numbers = super().forward(given, *args, **kwargs)
            loss, numbers = self._with_alignment(loss, numbers, hidden[self.config.align_layer], batch, geometry)
        else:
            loss, numbers = super().forward(given, *args, **kwargs)
        return loss, numbers if tokens is None else numbers | self._signs_of_learning(tokens)

    def _geometry_to_train_on(self, batch: Mapping[str, Any]) -> Geometry:
        geometry = Geometry.from_batch(batch)
        if geometry.ray.dtype == torch.bfloat16:  # FSDP's mixed precision casts what comes into the root module
            raise GeometryError(
                "geometry: expected float16 as in the cache, got bfloat16, which rounds eight times as coarsely: FSDP"
                " casts each batch so with --policy.dtype=bfloat16: train with --policy.dtype=float32, or without FSDP"
            )
        assert self._spec is not None
        if self._spec.feature is None:
            geometry = geometry.without_feature()  # a cache may have more than the policy learns from
        geometry.check(self._spec)
        return geometry

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
            self.model.projector.logged_as: alignment.learned,
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
        projector = self.model.projector
        target = projector.target(geometry, picture_areas(batch, keys, side))
        present = [key for key in self.config.image_features if key in batch]  # in LeRobot's order
        alignment: Alignment = projector.align(tokens_of_views(hidden, keys, present, side), target)
        return alignment

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
        if self.config.has_tokens:
            batch = batch | {_TOKENS: self._tokens(self.geometry_of(batch))}
        chunk: Tensor = super().predict_action_chunk(batch, *args, **kwargs)
        return chunk

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the next action [B, action dim]; a new chunk is predicted when the last one is used up.

        LeRobot keeps actions in a queue on the policy, which threads share. With one action a chunk there is nothing to
        keep: the queue is left out, and tasks can be evaluated in parallel.

        Raises:
            GeometryError: geometry or pictures do not fit what the policy was trained with.
            ModelError: the DA3 that the policy was trained with is not available.
        """
        if self.config.n_action_steps == 1 and not self._rtc_enabled():
            action: Tensor = self.predict_action_chunk(batch, *args, **kwargs)[:, 0]
        else:
            action = super().select_action(batch, *args, **kwargs)
        return action

    def _preprocess_images(
        self, batch: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[list[Tensor] | PrefixInputs, list[Tensor]]:
        """Prepare the pictures as LeRobot does, together with the batch's tokens."""
        images, img_masks = super()._preprocess_images(batch, *args, **kwargs)
        return _with_tokens(images, batch.get(_TOKENS)), img_masks

    def geometry_of(self, batch: Mapping[str, Any]) -> Geometry:
        """Return the geometry that a batch brings, otherwise that of its pictures.

        Raises:
            GeometryError: pictures are missing or do not fit what the policy was trained with.
            ModelError: the DA3 that the policy was trained with is not available.
        """
        if batch_key("ray") in batch:
            return Geometry.from_batch(batch)
        assert self.online is not None
        device = self.model.action_in_proj.weight.device
        return self.online(batch, device, allow_resize=self.allow_resize)

    def _tokens(self, geometry: Geometry) -> GeometryTokens:
        assert self._spec is not None
        geometry = geometry.without_feature()
        geometry.check(self._spec.without_feature())
        tokens: GeometryTokens = self.model.geometry_adapter(geometry)
        return tokens

    def _signs_of_learning(self, tokens: GeometryTokens) -> dict[str, float]:
        numbers = {
            "geom_alpha": self.model.geometry_adapter.alpha.detach().squeeze(),
            "geom_token_norm": mean_length(tokens.embs, tokens.pad_masks),
        }
        if self.model.image_token_norm is not None:
            numbers["image_token_norm"] = self.model.image_token_norm
        if self._adapter_grad_norm is not None:
            numbers["geom_grad_norm"] = self._adapter_grad_norm
        if self.training and torch.is_grad_enabled():
            self._watch_next_gradient()
        values = torch.stack([number.float() for number in numbers.values()]).tolist()  # one transfer
        return dict(zip(numbers, values, strict=True))

    def _watch_next_gradient(self) -> None:
        """Record the norm of the adapter's gradient in the next backward pass: the optimizer clears the gradient."""
        watched = [parameter for parameter in self.model.geometry_adapter.parameters() if parameter.requires_grad]

        def note(gradients: Sequence[Tensor | None]) -> None:
            self._adapter_grad_norm = torch.stack([g.float().norm() for g in gradients if g is not None]).norm()
            handle.remove()

        if watched:
            handle = torch.autograd.graph.register_multi_grad_hook(watched, note)

    def _get_default_peft_targets(self) -> dict[str, Any]:
        """Return LeRobot's LoRA targets; the added parts are trained in full and saved with them.

        LeRobot's targets are in the action expert, which the alignment loss does not reach: with it, the same
        projections of the language model's layers are targets too.
        """
        targets: dict[str, Any] = super()._get_default_peft_targets()
        targets["modules_to_save"] = [*targets["modules_to_save"], *sorted(self.config.parts)]
        if self.config.is_aligned:
            language = r".*\.paligemma\.model\.language_model\..*\.self_attn\.(q|v)_proj"
            targets["target_modules"] = f"({targets['target_modules']}|{language})"
        return targets

    def _validate_peft_config(self, peft_config: Any) -> None:
        """Refuse to freeze a fresh part.

        Raises:
            UserInputError: modules to train in full were given, without the added parts.
        """
        super()._validate_peft_config(peft_config)
        for part in sorted(self.config.parts):
            if part not in (peft_config.modules_to_save or ()):
                raise UserInputError(
                    f"peft.full_training_modules: expected {part} among them, got {peft_config.modules_to_save}:"
                    " add it, or leave the option out"
                )


def mean_length(tokens: Tensor, pad_masks: Tensor) -> Tensor:
    """Return the mean Euclidean length of the tokens [B, n, D] that are no padding, without gradient."""
    lengths: Tensor = torch.linalg.vector_norm(tokens.detach().float(), dim=-1)
    return (lengths * pad_masks).sum() / pad_masks.sum().clamp(min=1)


def _with_tokens(images: list[Tensor] | PrefixInputs, extra: GeometryTokens | None) -> list[Tensor] | PrefixInputs:
    return images if extra is None or isinstance(images, PrefixInputs) else PrefixInputs(images, extra)


def _tokens(embs: Tensor | None, pad_masks: Tensor | None, att_masks: Tensor | None) -> GeometryTokens | None:
    if embs is None:
        return None
    assert pad_masks is not None
    assert att_masks is not None
    return GeometryTokens(embs=embs, pad_masks=pad_masks, att_masks=att_masks)
