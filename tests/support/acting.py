"""A checkpoint that can act on the mock robot: a small policy with random weights, and a DA3 that is there."""

from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

from geomcache.cache.store import GeometryStore
from geomcache.extraction.options import ExtractOptions
from geomcache.extraction.run import extract
from tests.support.datasets import make_dataset
from tests.support.mockrobot import ACTIONS, CAMERAS, JOINTS
from tests.support.policy import make_config, shake
from tests.support.smolvla import make_language_model, make_smolvla_config

KEYS = tuple(f"observation.images.{name}" for name in CAMERAS)
SIDE = 64
CHUNK = 10


def make_acting_checkpoint(folder: Path, da3: Path, *, kind: str = "pi05", **options: Any) -> Path:
    """Extract a cache of a few frames, make a policy for it, and save it with its processors."""
    make_dataset(folder / "dataset", (3,), dict.fromkeys(KEYS, (SIDE, SIDE)))
    extract(
        ExtractOptions(
            model=str(da3),
            dataset="geomcache/test",
            root=folder / "dataset",
            output=folder / "cache.zarr",
            process_res=56,
            num_workers=0,
            device="cpu",
        )
    )
    pictures = {key: PolicyFeature(type=FeatureType.VISUAL, shape=(3, SIDE, SIDE)) for key in KEYS}
    state = PolicyFeature(type=FeatureType.STATE, shape=(len(JOINTS),))
    chosen: dict[str, Any] = {
        "bound": False,
        "input_features": {**pictures, "observation.state": state},
        "output_features": {"action": PolicyFeature(type=FeatureType.ACTION, shape=(len(ACTIONS),))},
        "max_state_dim": len(JOINTS),
        "tokenizer_max_length": 60,  # words are padded to it
        "normalization_mapping": {},
        "chunk_size": CHUNK,
        "n_action_steps": CHUNK,
    }
    if kind == "smolvla":
        language_model = make_language_model(folder / "smolvlm")
        config = make_smolvla_config(language_model, **(chosen | {"pad_language_to": "max_length"} | options))
    else:
        config = make_config(kind=kind, **(chosen | options))
    with GeometryStore.open(folder / "cache.zarr") as store:
        config.bind_cache(store.spec, store.statistics, store.fingerprint)
    torch.manual_seed(0)
    policy = get_policy_class(config.type)(config)
    shake(policy)
    policy.save_pretrained(folder / "policy")
    for processor in make_pre_post_processors(policy.config):
        processor.save_pretrained(folder / "policy")
    return folder / "policy"
