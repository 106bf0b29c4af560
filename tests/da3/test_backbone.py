"""Our walk through upstream's backbone against upstream's own, to the bit, for the shape of every model."""

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from depth_anything_3.cfg import create_object, load_config
from depth_anything_3.model.dinov2.dinov2 import DinoV2
from depth_anything_3.model.dinov2.layers import Block, RotaryPositionEmbedding2D, SwiGLUFFNFused
from depth_anything_3.model.dinov2.layers.attention import Attention
from depth_anything_3.model.dinov2.layers.rope import PositionGetter
from depth_anything_3.model.dinov2.vision_transformer import DinoVisionTransformer
from depth_anything_3.registry import MODEL_REGISTRY

from geomcache.da3.backbone import RotaryTables, Rotation, _rotate, backbone_forward
from geomcache.da3.catalog import MODELS

PRESETS = sorted({model.preset for model in MODELS.values() if model.ray_head})
SIZES = ((42, 56), (70, 28), (14, 14))  # pixels: 3x4, 5x2 and 1x1 patches


def random_backbone(preset: str, *, heads: int | None = None) -> Any:
    """Return a preset's backbone with random weights; with `heads`, as deep and of the same layers, but narrow."""
    config = load_config(MODEL_REGISTRY[preset])
    net = (config.anyview if "anyview" in config else config).net
    with init_empty_weights():
        backbone = create_object(net)
    if heads is not None:
        full = backbone.pretrained
        backbone.pretrained = DinoVisionTransformer(
            img_size=70,
            patch_size=14,
            embed_dim=64 * heads,
            num_heads=heads,
            depth=len(full.blocks),
            ffn_layer="swiglufused" if isinstance(full.blocks[0].mlp, SwiGLUFFNFused) else "mlp",
            alt_start=full.alt_start,
            qknorm_start=full.qknorm_start,
            rope_start=full.rope_start,
            cat_token=full.cat_token,
        )
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.empty(tensor.shape).normal_(std=0.05 if tensor.ndim > 1 else 1.0, generator=generator)
        for name, tensor in backbone.state_dict().items()
    }
    backbone.load_state_dict(tensors, assign=True)
    return backbone.eval().requires_grad_(requires_grad=False)


def assert_equal_to_upstream(backbone: Any, scenes: int, views: int, size: tuple[int, int]) -> None:
    images = torch.randn(scenes, views, 3, *size, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected, _ = backbone(images, cam_token=None, export_feat_layers=[], ref_view_strategy="first")
        tables = RotaryTables.make(backbone, *size, torch.device("cpu"))
        actual = backbone_forward(backbone, images, tables)
    assert len(actual) == len(expected) == 4
    for mine, (theirs, _) in zip(actual, expected, strict=True):
        assert mine.isfinite().all()
        assert mine.std() > 0.1
        assert torch.equal(mine, theirs)


@pytest.fixture(scope="module", params=PRESETS)
def narrow(request: pytest.FixtureRequest) -> Any:
    return random_backbone(request.param, heads=2)


# A scene of several views is `joint`, scenes of one view are `independent`; from three on upstream chooses a reference.
@pytest.mark.parametrize(("scenes", "views"), [(1, 2), (2, 2), (3, 1), (1, 3)])
@pytest.mark.parametrize("size", SIZES)
def test_features_are_upstreams_to_the_bit(narrow: Any, scenes: int, views: int, size: tuple[int, int]) -> None:
    assert_equal_to_upstream(narrow, scenes, views, size)


@pytest.mark.parametrize(
    "preset",
    ["da3-small", pytest.param("da3-base", marks=pytest.mark.slow), pytest.param("da3-large", marks=pytest.mark.slow)],
)
def test_features_of_whole_models_are_upstreams_to_the_bit(preset: str) -> None:
    backbone = random_backbone(preset)
    assert_equal_to_upstream(backbone, 2, 2, (42, 56))
    assert_equal_to_upstream(backbone, 2, 1, (70, 28))


def test_presets_differ_in_what_the_walk_has_to_follow() -> None:
    shapes = {}
    for preset in PRESETS:
        config = load_config(MODEL_REGISTRY[preset])
        with init_empty_weights():
            network = create_object((config.anyview if "anyview" in config else config).net).pretrained
        shapes[preset] = (len(network.blocks), network.alt_start, type(network.blocks[0].mlp).__name__)
    assert shapes == {
        "da3-small": (12, 4, "Mlp"),
        "da3-base": (12, 4, "Mlp"),
        "da3-large": (24, 8, "Mlp"),
        "da3-giant": (40, 13, "SwiGLUFFNFused"),
        "da3nested-giant-large": (40, 13, "SwiGLUFFNFused"),
    }


def test_the_comparison_notices_another_rotation() -> None:
    backbone = random_backbone("da3-small", heads=1)
    images = torch.randn(1, 2, 3, 42, 56, generator=torch.Generator().manual_seed(4))
    tables = RotaryTables.make(backbone, 42, 56, torch.device("cpu"))
    assert tables is not None
    swapped = RotaryTables(local=RotaryTables.make(backbone, 56, 42, torch.device("cpu")).local, scene=tables.scene)  # type: ignore[union-attr]
    with torch.no_grad():
        right, wrong = (backbone_forward(backbone, images, found) for found in (tables, swapped))
    assert not torch.equal(right[0], wrong[0])


def test_no_block_asks_the_device_for_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU would stop for it: upstream's own rotary module does not run."""
    backbone = random_backbone("da3-small", heads=1)
    tables = RotaryTables.make(backbone, 42, 56, torch.device("cpu"))

    def asked(*_: object) -> None:
        raise AssertionError("upstream's rotary module ran")

    monkeypatch.setattr(RotaryPositionEmbedding2D, "forward", asked)
    with torch.no_grad():
        backbone_forward(backbone, torch.randn(1, 2, 3, 42, 56), tables)


def test_tables_have_the_precision_of_upstreams(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's autocast casts `einsum`, in which upstream makes its angles; a CPU's does not, so it is imitated here."""
    backbone = random_backbone("da3-small", heads=1)
    rope = backbone.pretrained.rope
    tokens, positions = torch.randn(1, 1, 12, 64), torch.cartesian_prod(torch.arange(3), torch.arange(4))[None] + 1
    expected: dict[bool, torch.Tensor] = {}
    einsum = torch.einsum

    def as_on_cuda(equation: str, *operands: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            operands = tuple(operand.bfloat16() for operand in operands)
        return einsum(equation, *operands)

    monkeypatch.setattr(torch, "einsum", as_on_cuda)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            rope.frequency_cache.clear()
            expected[autocast] = rope(tokens, positions)
            rope.frequency_cache.clear()
            tables = RotaryTables.make(backbone, 42, 56, torch.device("cpu"))
        assert tables is not None
        local = Rotation(*(table[1:] for table in tables.local))
        assert torch.equal(_rotate(tokens, local), expected[autocast])
    assert not torch.equal(expected[False], expected[True])


FOLLOWED: tuple[Callable[..., Any], ...] = (
    DinoV2.forward,
    DinoVisionTransformer.get_intermediate_layers,
    DinoVisionTransformer._get_intermediate_layers_not_chunked,
    DinoVisionTransformer.process_attention,
    DinoVisionTransformer._prepare_rope,
    PositionGetter.__call__,
    RotaryPositionEmbedding2D.forward,
    RotaryPositionEmbedding2D._apply_1d_rope,
    RotaryPositionEmbedding2D._rotate_features,
    RotaryPositionEmbedding2D._compute_frequency_components,
    Block.forward,
    Attention.forward,
)
FOLLOWED_SHA256 = "8f194235b8e839eca7fa45daa45a858451eee1c2607ee87fc45d1b69acc9014b"


def test_upstreams_backbone_is_the_one_that_the_walk_follows() -> None:
    source = "".join(inspect.getsource(function) for function in FOLLOWED)
    assert hashlib.sha256(source.encode()).hexdigest() == FOLLOWED_SHA256, (
        "upstream's backbone changed: compare geomcache/da3/backbone.py with the functions of FOLLOWED line by line,"
        " then write the new hash here"
    )
