"""What a policy of LeRobot's inherits first, so that it learns and acts by geometry.

The batch brings its geometry in training; at inference it does, or its pictures are encoded. The adapter makes tokens
of it, which travel in the batch to where LeRobot prepares the pictures, and from there to `embed_prefix`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn

from geomcache.adapter import GeometryTokens
from geomcache.errors import GeometryError, ModelError, UserInputError
from geomcache.geometry import Geometry, batch_key
from geomcache.policy.checkpoint import adopt_geometry, checkpoint_file, load_weights, read_config, trained_parts
from geomcache.policy.online import OnlineEncoder
from geomcache.policy.options import GeometryOptions, LeRobotClass
from geomcache.policy.prefix import mean_length

TOKENS_KEY = "geometry_tokens"  # of the batch between the policy and its network


class GeometryPolicy(LeRobotClass):  # type: ignore[misc]
    """A policy with geometry: from the batch in training, from the batch or its pictures at inference.

    Attributes:
        allow_resize: accept pictures of another size than the cache was made of when encoding them; false.
        online: encodes pictures; None without geometry tokens. `online.encoder` is the DA3 encoder, once loaded.
    """

    name: ClassVar[str]
    config: Any  # GeometryOptions, and LeRobot's
    model: Any  # of `network_class`
    network_class: ClassVar[type[nn.Module]]
    """LeRobot's network with an `ExtendedPrefix`."""

    chunk_method: ClassVar[str] = "predict_action_chunk"
    """The method that LeRobot calls once for each chunk."""

    def __init__(self, config: GeometryOptions, *, weights_follow: bool = False, **_: Any) -> None:
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
        if not weights_follow and config.needs_pretrained:
            raise UserInputError(
                f"policy {self.name}: expected pretrained weights, got none: give --policy.pretrained_path, such as"
                f" {config.published}, or ask for random weights with --policy.random_init=true"
            )
        if config.use_geom_prefix and config.geom_spec is None:
            raise UserInputError(
                f"policy {self.name}: expected the cache's spec in geom_spec, found none: train with `geomcache train"
                f" --cache PATH`, load a {self.name} checkpoint, or set use_geom_prefix=false"
            )
        # Not the parent's constructor, which would build LeRobot's network first: 3.6 billion parameters for nothing.
        PreTrainedPolicy.__init__(self, config)
        self.init_rtc_processor()
        self.model = self.network_class(config, rtc_processor=self.rtc_processor)
        self.prepare_network()
        self.reset()
        self.allow_resize = False
        self._spec = config.geometry_spec
        self.online: OnlineEncoder | None = None
        if config.has_tokens:
            assert self._spec is not None
            self.online = OnlineEncoder(self._spec, config.geom_model_id, config.geom_engine)
        self._adapter_grad_norm: Tensor | None = None

    def prepare_network(self) -> None:
        """Do what LeRobot's constructor does to a new network."""

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
        """Load a checkpoint of this policy, or of the plain one into a policy with fresh parts. Always strict.

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
        saved = read_config(path, cls.name, **hub)
        weights = checkpoint_file(path, SAFETENSORS_SINGLE_FILE, **hub)
        if config is None:
            config = PreTrainedConfig.from_pretrained(path, **hub)
        if not isinstance(config, cls.config_class):
            raise ModelError(
                f"policy {path}: expected a {cls.name} configuration, got {config.type}: give config=, or load it"
                " with LeRobot's own policy class"
            )
        adopt_geometry(config, saved)
        policy = cls(config, weights_follow=True, **kwargs)
        load_weights(policy, path, weights, trained=trained_parts(saved))
        policy.eval()
        return policy

    def completed_weights(self, loaded: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of a file by the names of `state_dict`."""
        return loaded

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
        alignment loss, they have ``geom_action_loss``, ``geom_align_loss`` and ``geom_align_r2``, and where
        `measures_gradients` is set, what `compare_gradients` returns. Held-out batches, of a policy in evaluation mode,
        have the action loss alone, which can be compared between modes.

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
        given = batch if tokens is None else batch | {TOKENS_KEY: tokens}
        loss, numbers = self.loss_with_geometry(given, geometry, *args, **kwargs)
        return loss, numbers if tokens is None else numbers | self._signs_of_learning(tokens)

    def loss_with_geometry(
        self,
        batch: dict[str, Any],
        geometry: Geometry,  # noqa: ARG002 - of an alignment loss
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return LeRobot's loss of a batch that has its tokens, and numbers for the log."""
        loss: tuple[Tensor, dict[str, Any]] = super().forward(batch, *args, **kwargs)
        return loss

    def _geometry_to_train_on(self, batch: Mapping[str, Any]) -> Geometry:
        geometry = Geometry.from_batch(batch)
        if geometry.ray.dtype == torch.bfloat16:  # FSDP's mixed precision casts what comes into the root module
            raise GeometryError(
                "geometry: expected float16 as in the cache, got bfloat16, which rounds eight times as coarsely: FSDP"
                " casts each batch so with --policy.dtype=bfloat16: train with --policy.dtype=float32, or without FSDP"
            )
        assert self._spec is not None
        geometry.check(self._spec)
        return geometry

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

    def with_tokens_to_act(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch of observations with its geometry tokens, where the policy acts by them.

        Raises:
            GeometryError: geometry or pictures do not fit what the policy was trained with.
            ModelError: the DA3 that the policy was trained with is not available.
        """
        return batch | {TOKENS_KEY: self._tokens(self.geometry_of(batch))} if self.config.has_tokens else batch

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
        geometry.check(self._spec)
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
        """Return LeRobot's LoRA targets; the added parts are trained in full and saved with them."""
        targets: dict[str, Any] = super()._get_default_peft_targets()
        targets["modules_to_save"] = [*targets["modules_to_save"], *sorted(self.config.parts)]
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
