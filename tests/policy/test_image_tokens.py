"""Where image tokens look, and what their hidden states are, against LeRobot's own functions."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lerobot.policies.common.vla_utils import resize_with_pad_torch
from lerobot.policies.pi05 import modeling_pi05

from geomcache.policy.image_tokens import (
    HiddenStates,
    PictureArea,
    on_image_tokens,
    picture_areas,
    prefix_norms,
    tokens_of_views,
)
from geomcache.policy.small_paligemma import SMALL_GEMMA
from tests.support.policy import CAMERAS, IMAGE_TOKENS, TEXT, make_batch, make_policy

LAYERS = SMALL_GEMMA.depth


@pytest.mark.parametrize("side", [28, 112, 224])
@pytest.mark.parametrize("size", [(16, 16), (256, 256), (48, 64), (64, 48), (360, 640), (37, 91), (60, 300)])
def test_a_picture_is_where_lerobot_puts_it(size: tuple[int, int], side: int) -> None:
    square = resize_with_pad_torch(torch.ones(1, *size, 3), side, side)[0, ..., 0] > 0
    area = PictureArea.of(*size, side)
    expected = torch.zeros(side, side, dtype=torch.bool)
    expected[area.top : area.top + area.height, area.left : area.left + area.width] = True
    assert torch.equal(square, expected)


@pytest.mark.parametrize("grid", [(2, 2), (5, 7), (16, 16), (36, 36), (37, 20)])
def test_on_a_square_picture_it_is_torchs_interpolation(grid: tuple[int, int]) -> None:
    maps = torch.randn(3, *grid, 4, generator=torch.Generator().manual_seed(0))
    sampled, share = on_image_tokens(maps, PictureArea.of(256, 256, 112))
    expected = F.interpolate(
        maps.permute(0, 3, 1, 2), size=(8, 8), mode="bilinear", align_corners=False, antialias=True
    )
    torch.testing.assert_close(sampled, expected.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-6)
    assert torch.equal(share, torch.ones(64))


def test_on_a_wide_picture_tokens_see_their_own_place() -> None:
    """A map that holds its own places tells at each token where in the picture the token is."""
    area = PictureArea.of(60, 120, 112)  # 56 rows in the middle of 112: the first and last two rows of tokens are black
    y, x = torch.meshgrid((torch.arange(40) + 0.5) / 40, (torch.arange(80) + 0.5) / 80, indexing="ij")
    sampled, share = on_image_tokens(torch.stack([x, y], -1)[None], area)
    grid, inside = sampled.reshape(8, 8, 2), share.reshape(8, 8)
    assert torch.equal(inside, torch.tensor([0, 0, 1, 1, 1, 1, 0, 0]).float()[:, None].expand(8, 8))
    for row in range(3, 5):  # at the picture's border the filter is cut off
        for column in range(1, 7):
            place = grid[row, column].tolist()
            assert place == pytest.approx([(column + 0.5) / 8, (row - 2 + 0.5) / 4], abs=1e-6)


def test_a_token_on_the_border_lies_in_the_picture_by_its_share() -> None:
    area = PictureArea.of(80, 112, 112)  # rows 16 to 95: 12 of the 14 pixels of the second row of tokens
    _, share = on_image_tokens(torch.zeros(1, 4, 4, 1), area)
    assert share.reshape(8, 8)[:, 0].tolist() == pytest.approx([0, 12 / 14, 1, 1, 1, 1, 12 / 14, 0])


def test_pictures_of_a_batch() -> None:
    batch = {"a": torch.zeros(2, 3, 60, 120), "b": torch.zeros(2, 120, 60, 3)}
    areas = picture_areas(batch, ["b", "none", "a"], 112)
    assert areas == [PictureArea.of(120, 60, 112), None, PictureArea.of(60, 120, 112)]


def test_a_patch_of_the_picture_is_the_token_of_its_row_and_column() -> None:
    """The order of SigLIP's tokens, by the patch that each is embedded from."""
    policy = make_policy(image_resolution=(56, 56))
    (embed,) = (m for m in policy.modules() if type(m).__name__ == "SiglipVisionEmbeddings")
    black, picture = torch.zeros(1, 3, 56, 56), torch.zeros(1, 3, 56, 56)
    picture[:, :, 14:28, 42:56] = 1.0  # row 1, column 3
    with torch.no_grad():
        changed = (embed(picture) - embed(black)).abs().sum(-1)[0]
    assert torch.nonzero(changed).flatten().tolist() == [1 * 4 + 3]


def test_tokens_of_views_follow_the_order_of_the_cameras() -> None:
    hidden = torch.arange(11.0)[None, :, None]
    tokens = tokens_of_views(hidden, ["b", "a"], ["a", "b"], 28)
    assert tokens[0, :, :, 0].tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]


# The seam into LeRobot's layers


class Layers:
    """What LeRobot's own layer function returned for the prefix, pass by pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.outputs: list[torch.Tensor] = []
        original = modeling_pi05.compute_layer_complete

        def watched(inputs_embeds: Any, *args: Any, **kwargs: Any) -> Any:
            outputs = original(inputs_embeds, *args, **kwargs)
            self.outputs.append(outputs[0])
            return outputs

        monkeypatch.setattr(modeling_pi05, "compute_layer_complete", watched)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_hidden_states_are_what_lerobots_layers_return(
    monkeypatch: pytest.MonkeyPatch, gradient_checkpointing: bool
) -> None:
    layers = Layers(monkeypatch)
    policy = make_policy(use_geom_prefix=False, gradient_checkpointing=gradient_checkpointing).train()
    states = HiddenStates(policy.model.paligemma_with_expert, range(LAYERS + 1))
    with states.kept() as kept:
        loss = policy.forward(make_batch())[0]
    assert sorted(kept) == list(range(LAYERS + 1))
    assert kept[0].shape == (2, 2 * IMAGE_TOKENS + TEXT, SMALL_GEMMA.width)
    for number, output in enumerate(layers.outputs[:LAYERS], start=1):
        assert torch.equal(kept[number], output), number
    # A gradient leads back from each, and the pass that checkpointing repeats is not kept.
    (kept[LAYERS - 1].square().sum() + loss).backward()
    assert len(layers.outputs) == LAYERS * (2 if gradient_checkpointing else 1)
    assert states._states == {}
    assert all(
        parameter.grad is not None
        for parameter in policy.model.paligemma_with_expert.paligemma.model.vision_tower.parameters()
    )


def test_sampling_has_the_hidden_states_of_training() -> None:
    policy = make_policy(use_geom_prefix=False)
    states = HiddenStates(policy.model.paligemma_with_expert, range(LAYERS + 1))
    batch = make_batch(text=TEXT)
    with states.kept() as training, torch.no_grad():
        policy.forward(batch)
    with states.kept() as sampling:
        policy.predict_action_chunk(batch)
    for layer in range(LAYERS + 1):
        torch.testing.assert_close(sampling[layer], training[layer], rtol=1e-4, atol=1e-4)


def test_nothing_is_kept_outside_and_after_removal() -> None:
    policy = make_policy(use_geom_prefix=False)
    states = HiddenStates(policy.model.paligemma_with_expert, [1])
    policy.forward(make_batch())
    assert states._states == {}
    states.remove()
    with states.kept() as kept:
        policy.forward(make_batch())
    assert kept == {}
    assert not any(norm._forward_pre_hooks for norm in prefix_norms(policy.model.paligemma_with_expert))


def test_the_prefix_begins_with_the_image_tokens_of_the_cameras_in_order() -> None:
    policy = make_policy(use_geom_prefix=False)
    batch = make_batch()
    images, masks = policy._preprocess_images(batch)
    embs, *_ = policy.model.embed_prefix(
        images, masks, batch["observation.language.tokens"], batch["observation.language.attention_mask"]
    )
    tokens = tokens_of_views(embs, CAMERAS, list(policy.config.image_features), 28)
    for view, image in enumerate(images):
        assert torch.equal(tokens[:, view], policy.model.paligemma_with_expert.embed_image(image))
    assert np.prod(tokens.shape[1:3]) + TEXT == embs.shape[1]
