"""Serve `pi0_geometry`, `smolvla_geometry`, policies that act without geometry, and LoRA checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.async_inference.helpers import map_robot_keys_to_lerobot_features
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

from geomcache.errors import ModelNotFoundError
from geomcache.serving.actor import Actor
from geomcache.serving.messages import Hello, Observation
from tests.support.acting import CHUNK, KEYS, SIDE, make_acting_checkpoint
from tests.support.mockrobot import JOINTS, MockRobot, MockRobotConfig, scripted


def observed(number: int) -> Observation:
    values = {**scripted(number, SIDE), "task": "fold"}
    state = torch.tensor([values[joint] for joint in JOINTS]).numpy()
    return Observation(timestamp=0.0, timestep=number, must_go=True, state=state, values=values)


HELLO = Hello(joints=JOINTS, cameras=dict.fromkeys(KEYS, (SIDE, SIDE)), actions_per_chunk=CHUNK, device="cpu")


def in_process(policy: Any, config: Any, folder: str, observation: Observation) -> torch.Tensor:
    """Actions of a policy for what a robot saw, by LeRobot's own steps of a rollout."""
    from lerobot.async_inference.helpers import raw_observation_to_observation

    features = map_robot_keys_to_lerobot_features(MockRobot(MockRobotConfig(side=SIDE)))
    preprocess, postprocess = make_pre_post_processors(config, pretrained_path=folder)
    batch = preprocess(raw_observation_to_observation(dict(observation.values), features, config.image_features))
    actions: torch.Tensor = postprocess(policy.predict_action_chunk(batch)).squeeze(0)
    return actions


@pytest.mark.parametrize("kind", ["pi0", "smolvla"])
def test_another_policy_acts_as_in_this_process(kind: str, tmp_path: Path, random_da3_folder: Path) -> None:
    checkpoint = make_acting_checkpoint(tmp_path, random_da3_folder, kind=kind)
    actor = Actor.load(str(checkpoint))
    assert actor.wanted.policy_type == f"{kind}_geometry"
    assert set(actor.wanted.cameras) == set(KEYS)
    actor.warm()
    policy = get_policy_class(f"{kind}_geometry").from_pretrained(checkpoint)
    for number in (1, 2):
        torch.manual_seed(number)
        chunk = actor.predict(observed(number), HELLO)
        torch.manual_seed(number)
        expected = in_process(policy, policy.config, str(checkpoint), observed(number))
        assert torch.equal(chunk.actions, expected)
        assert "DA3" in chunk.parts()
        assert "denoising" in chunk.parts()
    assert actor.chunks == 2
    assert actor.encoder_calls == 3  # with the warm-up


def test_an_aligned_policy_is_served_without_da3(tmp_path: Path, random_da3_folder: Path) -> None:
    checkpoint = make_acting_checkpoint(
        tmp_path, random_da3_folder, geom_mode="align", geom_model_id=str(tmp_path / "nowhere")
    )
    actor = Actor.load(str(checkpoint))
    assert "DA3" not in actor.predict(observed(1), HELLO).parts()
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"geom_mode": "prefix"}))
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        Actor.load(str(checkpoint))


def test_a_lora_checkpoint_is_served_with_its_base(tmp_path: Path, random_da3_folder: Path) -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs the package peft")
    base = make_acting_checkpoint(tmp_path, random_da3_folder)
    policy = get_policy_class("pi05_geometry").from_pretrained(base)
    policy.config.pretrained_path = base
    wrapped = policy.wrap_with_peft(peft_cli_overrides={"r": 4})
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.05)  # as training would
    lora = tmp_path / "lora"
    wrapped.save_pretrained(lora)
    policy.config.save_pretrained(lora)
    for processor in make_pre_post_processors(policy.config, pretrained_path=str(base)):
        processor.save_pretrained(lora)
    assert not (lora / "model.safetensors").exists()

    actor = Actor.load(str(lora))
    assert isinstance(actor.policy, peft.PeftModel)
    torch.manual_seed(3)
    chunk = actor.predict(observed(1), HELLO)
    torch.manual_seed(3)
    expected = in_process(wrapped.eval(), policy.config, str(lora), observed(1))
    torch.testing.assert_close(chunk.actions, expected, rtol=1e-5, atol=1e-6)
    torch.manual_seed(3)
    without = Actor.load(str(base)).predict(observed(1), HELLO).actions
    assert (chunk.actions - without).abs().max() > 1e-3
    assert actor.encoder_calls == 1
