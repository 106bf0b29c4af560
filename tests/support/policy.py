"""Small policies, batches and checkpoints for the tests of the plugin."""

import copy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05 import modeling_pi05
from lerobot.policies.pi05.configuration_pi05 import PI05Config

from geomcache.geometry import Camera, Geometry, GeometrySpec
from geomcache.policy.configuration_pi05_geometry import PI05GeometryConfig
from geomcache.policy.modeling_pi05_geometry import PI05GeometryPolicy, SmallPI05
from geomcache.policy.pi0.configuration_pi0_geometry import PI0GeometryConfig
from geomcache.policy.pi0.modeling_pi0_geometry import PI0GeometryPolicy, SmallPI0
from geomcache.policy.small_paligemma import SMALL_GEMMA
from geomcache.statistics import Moments
from tests.support.geometry import example_geometry

CAMERAS = ("observation.images.front", "observation.images.wrist")
SIZE = 16  # of the dataset's pictures
GRID = (4, 4)
TARGET = (2, 2)
TEXT = 6  # tokens, padded
IMAGE_TOKENS = 4  # of one camera: 28 px, patches of 14
CHUNK = 4
ACTION_DIM = 3

# 28 px pictures, few tokens and few denoising steps: a forward pass takes milliseconds.
QUICK: dict[str, Any] = {
    "device": "cpu",
    "push_to_hub": False,
    "image_resolution": (28, 28),
    "tokenizer_max_length": TEXT,
    "chunk_size": CHUNK,
    "n_action_steps": CHUNK,
    "max_action_dim": ACTION_DIM,
    "num_inference_steps": 2,
}


def make_spec(outputs: tuple[str, ...] = ("ray", "ray_conf"), size: int = SIZE) -> GeometrySpec:
    """A spec that names a model nobody has."""
    return GeometrySpec(
        model_id="made-up",
        model_revision=None,
        model_name="da3-small",
        weights_sha256="00" * 32,
        da3_version="0.1.1",
        views="joint",
        cameras=tuple(Camera(key=key, height=size, width=size) for key in CAMERAS),
        process_res=56,
        grid=f"{GRID[0]}x{GRID[1]}",
        grid_hw=GRID,
        outputs=outputs,
        compute_dtype="fp32",
    )


def make_statistics(spec: GeometrySpec) -> dict[str, Moments]:
    """Return moments of the example geometry."""
    example = example_geometry(batch=4, views=len(spec.cameras), grid_hw=spec.grid_hw, outputs=spec.outputs)
    return {name: Moments.of(name, values) for name, values in example.items()}


def features() -> dict[str, dict[str, PolicyFeature]]:
    """Features that `make_policy` would take from a dataset."""
    pictures = {key: PolicyFeature(type=FeatureType.VISUAL, shape=(3, SIZE, SIZE)) for key in CAMERAS}
    return {
        "input_features": {**pictures, "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(2,))},
        "output_features": {"action": PolicyFeature(type=FeatureType.ACTION, shape=(ACTION_DIM,))},
    }


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A policy on PaliGemma: our classes and LeRobot's."""

    config: Any
    policy: Any
    small: Any
    plain_config: Any
    plain: ModuleType
    plain_policy: str


KINDS = {
    "pi05": Kind(
        config=PI05GeometryConfig,
        policy=PI05GeometryPolicy,
        small=SmallPI05,
        plain_config=PI05Config,
        plain=modeling_pi05,
        plain_policy="PI05Policy",
    ),
    "pi0": Kind(
        config=PI0GeometryConfig,
        policy=PI0GeometryPolicy,
        small=SmallPI0,
        plain_config=PI0Config,
        plain=modeling_pi0,
        plain_policy="PI0Policy",
    ),
}


def make_config(*, kind: str = "pi05", spec: GeometrySpec | None = None, bound: bool = True, **options: Any) -> Any:
    """A quick configuration of the small variant, with the spec of a cache unless it is not to be bound."""
    config = KINDS[kind].config(**(QUICK | features() | {"model_size": "small", "geom_target_hw": TARGET} | options))
    if bound:
        spec = spec or make_spec()
        config.bind_cache(spec, make_statistics(spec), "f" * 64)
    return config


_built: dict[str, Any] = {}


def make_policy(seed: int = 0, **options: Any) -> Any:  # not typed: tests reach into LeRobot's parts
    """Return a copy of a quick policy with weights of this seed, Pi0.5 or `kind`, in evaluation mode."""
    key = repr((seed, options))
    if key not in _built:
        _built[key] = build_policy(seed, **options)
    return copy.deepcopy(_built[key])


def build_policy(seed: int = 0, **options: Any) -> Any:
    """Build a quick policy, as `make_policy` copies it."""
    torch.manual_seed(seed)
    policy = KINDS[options.get("kind", "pi05")].policy(make_config(**options))
    shake(policy)
    return policy.eval()


def shake(policy: torch.nn.Module) -> None:
    """Give weights that start at zero (adaptive norms) values: at zero they gate the action expert off."""
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith("dense.weight"):
                parameter.normal_(std=0.05)


def make_plain_policy(monkeypatch: pytest.MonkeyPatch, seed: int = 0, *, kind: str = "pi05", **options: Any) -> Any:
    """LeRobot's own policy in the small size: its hard-wired sizes are replaced while it is built."""
    theirs = KINDS[kind]
    config = theirs.plain_config(**(QUICK | features() | options))
    torch.manual_seed(seed)
    with monkeypatch.context() as patch:
        patch.setattr(theirs.plain, "get_gemma_config", lambda variant: SMALL_GEMMA)
        patch.setattr(theirs.plain, "PaliGemmaWithExpertModel", lambda *_, **__: theirs.small(config))
        policy = getattr(theirs.plain, theirs.plain_policy)(config)
    shake(policy)
    return policy.eval()


def make_batch(batch: int = 2, *, geometry: bool = True, seed: int = 1, text: int = 4) -> dict[str, Any]:
    """A batch as LeRobot's preprocessor leaves it: `text` tokens and padding, pictures k/255 as float32."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Any] = {
        key: torch.randint(0, 256, (batch, 3, SIZE, SIZE), generator=generator).float() / 255 for key in CAMERAS
    }
    made["observation.state"] = torch.rand(batch, 2, generator=generator)
    made["observation.language.tokens"] = torch.randint(1, 256, (batch, TEXT), generator=generator)
    made["observation.language.attention_mask"] = (torch.arange(TEXT) < text).expand(batch, TEXT)
    made["action"] = torch.randn(batch, CHUNK, ACTION_DIM, generator=generator)
    if geometry:
        made |= make_geometry(batch).to_batch()
    return made


def make_geometry(batch: int = 2, *, shift: float = 0.0, outputs: tuple[str, ...] = ("ray", "ray_conf")) -> Geometry:
    """Example geometry as float16 tensors; `shift` makes another one."""
    example = example_geometry(batch=batch, views=len(CAMERAS), grid_hw=GRID, outputs=outputs)
    return Geometry(**{name: torch.from_numpy(values + np.float16(shift)) for name, values in example.items()})


def loss_and_chunk(policy: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Training loss and sampled actions, with the same noise at every call."""
    torch.manual_seed(7)
    loss, _ = policy.forward(batch)
    torch.manual_seed(7)
    return loss.detach(), policy.predict_action_chunk(batch)


def save(policy: Any, folder: Path) -> Path:
    """Save a checkpoint and return its folder."""
    policy.save_pretrained(folder)
    return folder
