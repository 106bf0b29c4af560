"""A prefix that is extended by given tokens: the seam into LeRobot's networks.

    prefix   image tokens | text tokens, padded | geometry tokens ( | state, in SmolVLA)       suffix   noisy actions

`embed_prefix` is the seam: LeRobot's `forward` and `sample_actions` both take the prefix from it, and derive position
ids (cumulative sum of the pad masks) and the attention mask from what it returns. Everything else is inherited.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from geomcache.adapter import GeometryTokenAdapter, GeometryTokens
from geomcache.policy.options import GeometryOptions, LeRobotClass


class PrefixInputs(NamedTuple):
    """Pictures and the tokens that go with them.

    LeRobot's `forward` and `sample_actions` hand their first argument to `embed_prefix` and do nothing else with it.
    Tokens travel inside it and never wait in the network, which threads share: LeRobot evaluates tasks in parallel.
    """

    images: list[Tensor]  # [B, 3, H, W] of each camera, padding included
    extra: GeometryTokens


class ExtendedPrefix(LeRobotClass):  # type: ignore[misc]
    """What a network of LeRobot's inherits first, so that its prefix can be extended by given tokens.

    Wherever it takes `images`, it also takes `PrefixInputs`.

    Attributes:
        geometry_adapter: only with geometry tokens.
        image_token_norm: mean length of the image tokens in the last training step with extra tokens; logged.
    """

    text_argument = "tokens"
    """What LeRobot's `embed_prefix` calls the tokens of the text, its third argument."""

    image_token_norm: Tensor | None = None

    def add_adapter(self, config: GeometryOptions, width: int) -> None:
        """Add the adapter that a configuration asks for, for a prefix of this width."""
        if not config.has_tokens:
            return
        spec = config.geometry_spec
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

    def embed_prefix(
        self, images: list[Tensor] | PrefixInputs, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embed LeRobot's prefix and add the extra tokens: embeddings [B, P, D], pad and attention masks [B, P].

        `args` and `kwargs` are LeRobot's: the masks of the pictures, the text and its masks, and what a later version
        adds.
        """
        upstream = super().embed_prefix
        if not isinstance(images, PrefixInputs):
            plain: tuple[Tensor, Tensor, Tensor] = upstream(images, *args, **kwargs)
            return plain
        extra = images.extra
        embs, pad_masks, att_masks = upstream(images.images, *args, **kwargs)
        place = embs.shape[1] - self.tokens_after_geometry(*args, **kwargs)
        if self.training:
            text = args[1] if len(args) > 1 else kwargs[self.text_argument]
            image_tokens = place - text.shape[1]
            # The pad mask leaves out empty cameras.
            self.image_token_norm = mean_length(embs[:, :image_tokens], pad_masks[:, :image_tokens])
        return (
            _inserted(embs, extra.embs.to(embs.dtype), place),
            _inserted(pad_masks, extra.pad_masks, place),
            _inserted(att_masks, extra.att_masks, place),
        )

    def tokens_after_geometry(self, *_args: Any, **_kwargs: Any) -> int:
        """Return how many tokens of LeRobot's prefix come after geometry, by the arguments of `embed_prefix`."""
        return 0

    def forward(
        self,
        images: list[Tensor] | PrefixInputs,
        *args: Any,
        extra_prefix_embs: Tensor | None = None,
        extra_prefix_pad_masks: Tensor | None = None,
        extra_prefix_att_masks: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return LeRobot's loss of each action dimension, with tokens added to the prefix.

        Args:
            images: [B, 3, H, W] of each camera.
            args: LeRobot's: img_masks, tokens, masks, actions, noise, time, and what a later version adds.
            extra_prefix_embs: [B, n, D]; the next two go with it.
            extra_prefix_pad_masks: [B, n] bool, false for padding.
            extra_prefix_att_masks: [B, n] bool, true where a block opens that earlier tokens do not see.
            kwargs: as args.
        """
        extra = _tokens(extra_prefix_embs, extra_prefix_pad_masks, extra_prefix_att_masks)
        losses: Tensor = super().forward(with_tokens(images, extra), *args, **kwargs)
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
        """Return LeRobot's actions, with tokens added to the prefix, given as to `forward`."""
        extra = _tokens(extra_prefix_embs, extra_prefix_pad_masks, extra_prefix_att_masks)
        actions: Tensor = super().sample_actions(with_tokens(images, extra), *args, **kwargs)
        return actions


def mean_length(tokens: Tensor, pad_masks: Tensor) -> Tensor:
    """Return the mean Euclidean length of the tokens [B, n, D] that are no padding, without gradient."""
    lengths: Tensor = torch.linalg.vector_norm(tokens.detach().float(), dim=-1)
    return (lengths * pad_masks).sum() / pad_masks.sum().clamp(min=1)


def with_tokens(images: list[Tensor] | PrefixInputs, extra: GeometryTokens | None) -> list[Tensor] | PrefixInputs:
    """Return pictures together with the tokens that go with them, if there are any."""
    return images if extra is None or isinstance(images, PrefixInputs) else PrefixInputs(images, extra)


def _tokens(embs: Tensor | None, pad_masks: Tensor | None, att_masks: Tensor | None) -> GeometryTokens | None:
    if embs is None:
        return None
    assert pad_masks is not None
    assert att_masks is not None
    return GeometryTokens(embs=embs, pad_masks=pad_masks, att_masks=att_masks)


def _inserted(tokens: Tensor, extra: Tensor, place: int) -> Tensor:
    """Insert [B, n, ...] into [B, P, ...] before position `place`."""
    return torch.cat([tokens[:, :place], extra, tokens[:, place:]], dim=1)
