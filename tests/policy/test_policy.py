"""The policy `pi05_geometry`: its prefix, its training and its inference, against LeRobot's own Pi0.5."""

import copy
import dataclasses
import functools
import math
import pickle
import sys
import threading
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig
from lerobot.optim.optimizers import load_optimizer_state, save_optimizer_state
from lerobot.policies.pi05 import modeling_pi05
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.utils.logging_utils import AverageMeter, MetricsTracker

from geomcache.errors import GeometryError, ModelError, UserInputError
from geomcache.geometry import Geometry, GeometrySpec
from geomcache.policy.modeling_pi05_geometry import PI05GeometryPolicy
from geomcache.policy.online import OnlineEncoder, to_uint8
from geomcache.policy.prefix import PrefixInputs
from tests.support.geometry import example_geometry
from tests.support.logs import logged_lines
from tests.support.policy import (
    ACTION_DIM,
    CAMERAS,
    CHUNK,
    IMAGE_TOKENS,
    SIZE,
    TEXT,
    build_policy,
    loss_and_chunk,
    make_batch,
    make_config,
    make_geometry,
    make_plain_policy,
    make_policy,
    make_spec,
)

IMAGES = 2 * IMAGE_TOKENS
GEOMETRY = 2 * 2 * 2  # views, target grid
PREFIX = IMAGES + TEXT + GEOMETRY
VALID_TEXT = 4


class Network:
    """What went through PaliGemmaWithExpertModel.forward, in order."""

    def __init__(self, policy: PI05GeometryPolicy) -> None:
        self.given: list[dict[str, Any]] = []
        self.prefix: list[torch.Tensor] = []
        self.network = policy.model.paligemma_with_expert
        self.original = self.network.forward
        self.network.forward = self

    def __call__(self, **kwargs: Any) -> Any:
        outputs, cache = self.original(**kwargs)
        self.given.append(kwargs)
        if outputs[0] is not None:
            self.prefix.append(outputs[0].detach())
        return [outputs, cache]


@pytest.fixture(params=["forward", "sample"])
def run(request: pytest.FixtureRequest) -> Any:
    """One pass of a policy over a batch, in training or in sampling: its result, and what the network saw."""

    def run(policy: PI05GeometryPolicy, batch: dict[str, Any]) -> tuple[torch.Tensor, Network]:
        network = Network(policy)
        torch.manual_seed(3)
        if request.param == "forward":
            with torch.no_grad():
                result = policy.forward(batch, reduction="none")[0]
        else:
            result = policy.predict_action_chunk(batch)
        policy.model.paligemma_with_expert.forward = network.original
        return result, network

    run.__name__ = request.param
    return run


# Off means plain Pi0.5


def test_without_geometry_it_is_lerobots_policy_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_plain_policy(monkeypatch)
    policy = make_policy(use_geom_prefix=False)
    assert dict(policy.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    assert policy.online is None
    for name, value in plain.state_dict().items():
        assert torch.equal(policy.state_dict()[name], value), name
    for batch in (make_batch(), make_batch(geometry=False)):
        theirs, ours = loss_and_chunk(plain, batch), loss_and_chunk(policy, batch)
        assert torch.equal(theirs[0], ours[0])
        assert torch.equal(theirs[1], ours[1])


def test_without_geometry_it_trains_as_lerobots_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    for policy in (make_plain_policy(monkeypatch), make_policy(use_geom_prefix=False)):
        policy.train()
        optimizer = AdamWConfig(lr=1e-3).build(policy.get_optim_params())
        for step in range(2):
            torch.manual_seed(step)
            loss, numbers = policy.forward(make_batch(seed=step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert numbers.keys() == {"loss", "loss_per_dim"}
        trained.append(policy.state_dict())
    for name, value in trained[0].items():
        assert torch.equal(trained[1][name], value), name


def test_with_geometry_it_is_another_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, policy = make_plain_policy(monkeypatch), make_policy()
    assert not torch.equal(loss_and_chunk(plain, make_batch())[1], loss_and_chunk(policy, make_batch())[1])


# The prefix


@pytest.mark.parametrize("attention", ["full", "isolated"])
def test_prefix_by_hand(run: Any, attention: str) -> None:
    policy = make_policy(geom_attention=attention)
    _, network = run(policy, make_batch(text=VALID_TEXT))
    given = network.given[0]
    positions, mask = given["position_ids"], given["attention_mask"]
    # 8 image tokens, 4 words, 2 padded ones, 8 of geometry; then, in training, 4 of actions.
    expected_positions = [*range(8), 8, 9, 10, 11, 11, 11, *range(12, 20)]
    valid = [True] * 12 + [False] * 2 + [True] * 8
    sees = [[True] * PREFIX for _ in range(PREFIX)]
    if attention == "isolated":
        for row in range(IMAGES + TEXT):
            sees[row] = [True] * (IMAGES + TEXT) + [False] * GEOMETRY
    if run.__name__ == "forward":
        expected_positions += [20, 21, 22, 23]
        valid += [True] * CHUNK
        sees = [[*row, *[False] * CHUNK] for row in sees] + [[True] * (PREFIX + CHUNK)] * CHUNK
    seen = [[s and a and b for s, b in zip(row, valid, strict=True)] for row, a in zip(sees, valid, strict=True)]
    assert positions.tolist() == [expected_positions] * 2
    assert (mask == 0).squeeze(1).tolist() == [seen] * 2
    if run.__name__ == "sample":  # every action of every denoising step sees all of the prefix but padding
        assert len(network.given) == 1 + policy.config.num_inference_steps
        for step in network.given[1:]:
            assert step["position_ids"].tolist() == [[20, 21, 22, 23]] * 2
            visible = (step["attention_mask"] == 0).squeeze(1)
            assert visible.tolist() == [[valid[:PREFIX] + [True] * CHUNK] * CHUNK] * 2


@pytest.mark.parametrize("attention", ["full", "isolated"])
def test_who_notices_another_geometry(run: Any, attention: str) -> None:
    policy = make_policy(geom_attention=attention, geom_init_alpha=1.0)
    batch = make_batch(text=VALID_TEXT)
    other = batch | make_geometry(shift=0.5).to_batch()
    (result, network), (other_result, other_network) = run(policy, batch), run(policy, other)
    before, after = network.prefix[0], other_network.prefix[0]
    valid = IMAGES + VALID_TEXT  # padded words are seen by nobody
    image_and_text_stay = torch.equal(before[:, :valid], after[:, :valid])
    assert image_and_text_stay == (attention == "isolated")
    assert not torch.equal(before[:, -GEOMETRY:], after[:, -GEOMETRY:])
    assert not torch.equal(result, other_result)


def test_image_and_text_embeddings_are_lerobots(run: Any) -> None:
    batch = make_batch()
    _, with_geometry = run(make_policy(), batch)
    _, without = run(make_policy(use_geom_prefix=False), batch)
    embs, plain = with_geometry.given[0]["inputs_embeds"][0], without.given[0]["inputs_embeds"][0]
    assert embs.shape[1] == plain.shape[1] + GEOMETRY
    assert torch.equal(embs[:, :-GEOMETRY], plain)


def test_geometry_tokens_are_the_adapters(run: Any) -> None:
    policy = make_policy()
    _, network = run(policy, make_batch())
    tokens = policy.model.geometry_adapter(make_geometry())
    assert torch.equal(network.given[0]["inputs_embeds"][0][:, -GEOMETRY:], tokens.embs)


def test_the_network_takes_extra_tokens_from_any_caller() -> None:
    policy = make_policy()
    batch = make_batch()
    tokens = policy.model.geometry_adapter(make_geometry())
    extra = {
        "extra_prefix_embs": tokens.embs,
        "extra_prefix_pad_masks": tokens.pad_masks,
        "extra_prefix_att_masks": tokens.att_masks,
    }
    images, img_masks = policy._preprocess_images(batch)
    prefix = (
        images,
        img_masks,
        batch["observation.language.tokens"],
        batch["observation.language.attention_mask"],
    )
    noise, time = torch.randn(2, CHUNK, ACTION_DIM), torch.tensor([0.3, 0.8])
    bundled = (PrefixInputs(images, tokens), *prefix[1:])
    expected = policy.model.forward(*bundled, batch["action"], noise, time)
    expected_actions = policy.model.sample_actions(*bundled, noise=noise)
    assert torch.equal(policy.model.forward(*prefix, batch["action"], noise, time, **extra), expected)
    assert torch.equal(policy.model.sample_actions(*prefix, noise=noise, **extra), expected_actions)
    # Nothing stays behind.
    without = policy.model.embed_prefix(*prefix)
    assert without[0].shape[1] == IMAGES + TEXT


def test_extra_tokens_may_be_padded(run: Any) -> None:
    """Padded extra tokens are seen by nobody: their content does not matter."""
    policy = make_policy()
    adapter = policy.model.geometry_adapter
    results = []
    for filler in (0.0, 100.0):
        tokens = adapter(make_geometry())
        tokens.pad_masks[:, -3:] = False
        tokens.embs[:, -3:] = filler
        policy.model.geometry_adapter.forward = lambda geometry, tokens=tokens: tokens
        results.append(run(policy, make_batch())[0])
    assert torch.equal(*results)


# Training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observation.geometry.ray": None}, "found no geometry among"),
        ({"observation.geometry.ray_conf": None}, "expected outputs ray, ray_conf, got ray"),
        (
            example_geometry(batch=2, views=2, grid_hw=(5, 4)).to_batch(),
            r"expected \[V, h, w\] = \[2, 4, 4\], got \[2, 5, 4\]",
        ),
        (example_geometry(batch=2, views=1, grid_hw=(4, 4)).to_batch(), r"got \[1, 4, 4\]"),
    ],
)
def test_training_without_the_right_geometry_is_an_error(change: dict[str, Any], message: str) -> None:
    batch = {key: value for key, value in (make_batch() | change).items() if value is not None}
    with pytest.raises(GeometryError, match=message):
        make_policy().forward(batch)


def training_policy(**options: Any) -> Any:
    policy = make_policy(**options)
    policy.train()
    return policy


def gradients(policy: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    policy.forward(batch)[0].backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def test_gradient_reaches_the_adapter_through_checkpointing() -> None:
    plain = gradients(training_policy(), make_batch())
    checkpointed = gradients(training_policy(gradient_checkpointing=True), make_batch())
    assert plain.keys() == checkpointed.keys()
    for name in ("alpha", "projection.weight", "projection.bias"):
        assert plain[f"model.geometry_adapter.{name}"].abs().sum() > 0
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_the_adapter_trains_beside_a_frozen_model() -> None:
    found = gradients(training_policy(train_expert_only=True, freeze_vision_encoder=True), make_batch())
    assert found["model.geometry_adapter.projection.weight"].abs().sum() > 0
    assert not [name for name in found if ".paligemma." in name]
    found = gradients(training_policy(freeze_vision_encoder=True), make_batch())
    assert found["model.geometry_adapter.projection.weight"].abs().sum() > 0
    assert not [name for name in found if ".vision_tower." in name]
    assert [name for name in found if ".language_model." in name]


def test_bfloat16() -> None:
    policy = training_policy(dtype="bfloat16", geom_modality_embedding=True)
    language = policy.model.paligemma_with_expert.paligemma.model.language_model
    assert language.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert policy.model.geometry_adapter.projection.weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as LeRobot trains with this dtype
        loss, numbers = policy.forward(make_batch())
    loss.backward()
    assert policy.model.geometry_adapter.projection.weight.grad.abs().sum() > 0
    assert policy.model.geometry_adapter.view_embedding.grad.abs().sum() > 0
    assert all(math.isfinite(numbers[name]) for name in ("loss", "geom_token_norm", "image_token_norm"))
    assert policy.predict_action_chunk(make_batch()).shape == (2, CHUNK, ACTION_DIM)


def test_optimizer_gives_the_adapter_its_own_rate(tmp_path: Path) -> None:
    policy = training_policy(optimizer_lr=1e-3, geom_lr_scale=20.0)
    config = policy.config.get_optimizer_preset()
    optimizer = config.build(policy.get_optim_params())
    scheduler = policy.config.get_scheduler_preset().build(optimizer, 40)
    rest, adapter = optimizer.param_groups
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    assert {names[id(p)] for p in adapter["params"]} == {n for n in names.values() if "geometry_adapter" in n}
    assert len(rest["params"]) + len(adapter["params"]) == len(names)
    rates = []
    for _ in range(40):
        optimizer.step()
        scheduler.step()
        rates.append(rest["lr"])
        assert adapter["lr"] == pytest.approx(20 * rest["lr"], rel=1e-12)
    assert max(rates) == pytest.approx(1e-3, rel=0.05)  # warms up to the policy's rate
    assert rates[-1] < 2e-5  # and decays: the ratio held throughout
    assert rest["weight_decay"] == adapter["weight_decay"] == config.weight_decay

    save_optimizer_state(optimizer, tmp_path)
    resumed = config.build(policy.get_optim_params())
    policy.config.get_scheduler_preset().build(resumed, 40)
    load_optimizer_state(resumed, tmp_path)
    assert [group["lr"] for group in resumed.param_groups] == [rest["lr"], adapter["lr"]]


def test_lerobots_optimizer_and_schedule_are_the_presets() -> None:
    """The group's rate comes from `optimizer_lr`; LeRobot's preset builds from the same number."""
    policy = make_policy()
    assert isinstance(policy.config.get_optimizer_preset(), AdamWConfig)
    assert policy.config.get_optimizer_preset().lr == policy.config.optimizer_lr == 2.5e-5
    assert isinstance(policy.config.get_scheduler_preset(), CosineDecayWithWarmupSchedulerConfig)
    assert policy.get_optim_params()[1]["lr"] == 2.5e-4


def test_each_step_tells_whether_geometry_is_learned() -> None:
    policy = training_policy(geom_init_alpha=0.25)
    network = Network(policy)
    loss, numbers = policy.forward(make_batch())
    assert "geom_grad_norm" not in numbers  # there was no backward pass yet
    assert numbers["geom_alpha"] == 0.25
    embs = network.given[0]["inputs_embeds"][0].detach()
    lengths = embs.double().square().sum(-1).sqrt()
    assert numbers["geom_token_norm"] == pytest.approx(lengths[:, -GEOMETRY:].mean().item(), rel=1e-6)
    assert numbers["image_token_norm"] == pytest.approx(lengths[:, :IMAGES].mean().item(), rel=1e-6)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in policy.model.geometry_adapter.parameters()]).norm().item()
    assert expected > 0
    policy.zero_grad()
    _, numbers = policy.forward(make_batch())
    assert numbers["geom_grad_norm"] == pytest.approx(expected, rel=1e-6)
    # LeRobot's tracker prints every number it is given.
    tracker = MetricsTracker(2, 10, 1, {"loss": AverageMeter("loss", ":.3f")})
    tracker.update_metrics(numbers)
    line = str(tracker)
    for name in ("geom_alpha:0.250", "geom_grad_norm:", "geom_token_norm:", "image_token_norm:"):
        assert name in line


def test_the_watch_on_gradients_does_not_pile_up() -> None:
    policy = training_policy()
    weight = policy.model.geometry_adapter.projection.weight
    norms = []
    for step in range(4):
        torch.manual_seed(step)
        loss, numbers = policy.forward(make_batch())
        norms.append(numbers.get("geom_grad_norm"))
        policy.zero_grad()
        loss.backward()
    assert len({norm for norm in norms if norm}) == 3  # of the step before, each time
    assert not weight._backward_hooks
    policy.eval()
    with torch.no_grad():
        assert "geom_grad_norm" in policy.forward(make_batch())[1]


def test_empty_cameras_do_not_count_as_image_tokens() -> None:
    policy = training_policy(empty_cameras=1)
    network = Network(policy)
    _, numbers = policy.forward(make_batch())
    embs = network.given[0]["inputs_embeds"][0].detach()
    assert embs.shape[1] == 3 * IMAGE_TOKENS + TEXT + GEOMETRY
    expected = embs[:, :IMAGES].norm(dim=-1).mean().item()
    assert numbers["image_token_norm"] == pytest.approx(expected, rel=1e-6)


def test_learning_moves_the_adapter_and_not_the_statistics() -> None:
    policy = training_policy(optimizer_lr=1e-3)
    before = copy.deepcopy(policy.model.geometry_adapter.state_dict())
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    policy.forward(make_batch())[0].backward()
    optimizer.step()
    after = policy.model.geometry_adapter.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"alpha", "projection.weight", "projection.bias"}


# LeRobot's other modes


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's, hidden outside of tests
def test_compiled_model_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile_model` compiles our `forward` and `sample_actions`. Dynamo traces them; its eager backend runs them."""
    eager = make_policy(num_inference_steps=1)
    compiled_functions = []

    def traced(function: Any, *, mode: str) -> Any:
        assert mode == "max-autotune"
        compiled_functions.append(function.__qualname__)
        return torch._dynamo.optimize("eager")(function)

    with monkeypatch.context() as patch:
        patch.setattr(modeling_pi05.torch, "compile", traced)
        compiled = build_policy(compile_model=True, num_inference_steps=1)
    assert compiled_functions == ["ExtendedPrefix.sample_actions", "ExtendedPrefix.forward"]
    for shift in (0.0, 0.5):  # a graph that had kept the first tokens would fail the second time
        batch = make_batch() | make_geometry(shift=shift).to_batch()
        for ours, theirs in zip(loss_and_chunk(compiled, batch), loss_and_chunk(eager, batch), strict=True):
            torch.testing.assert_close(ours, theirs)
    compiled.train()
    compiled.forward(make_batch())[0].backward()
    assert compiled.model.geometry_adapter.projection.weight.grad.abs().sum() > 0


def test_real_time_chunking_sees_geometry() -> None:
    policy = make_policy(rtc_config=RTCConfig(enabled=True, execution_horizon=3), geom_init_alpha=1.0)
    batch = make_batch(1)
    torch.manual_seed(0)
    first = policy.predict_action_chunk(batch)

    def follow(batch: dict[str, Any]) -> torch.Tensor:
        torch.manual_seed(0)
        chunk: torch.Tensor = policy.predict_action_chunk(
            batch, inference_delay=1, prev_chunk_left_over=first[:, 1:] + 1.0, execution_horizon=3
        )
        return chunk

    assert not torch.equal(follow(batch), first)  # guided towards the left-over
    assert not torch.equal(follow(batch | make_geometry(1, shift=0.5).to_batch()), follow(batch))


def test_lora_trains_and_reloads_the_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs the package peft")
    base = make_policy()
    base.save_pretrained(tmp_path / "base")
    config = make_config(pretrained_path=tmp_path / "base")
    policy = PI05GeometryPolicy.from_pretrained(tmp_path / "base", config=config)
    wrapped = policy.wrap_with_peft(peft_cli_overrides={"r": 4})
    trainable = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert {name.rsplit(".", 1)[-1] for name in trainable if "geometry_adapter" in name} == {"alpha", "weight", "bias"}
    assert any("lora_A" in name and "gemma_expert" in name for name in trainable)
    wrapped.train()
    optimizer = config.get_optimizer_preset().build(wrapped.get_optim_params())
    assert optimizer.param_groups[1]["lr"] == 10 * optimizer.param_groups[0]["lr"]
    for step in range(3):
        torch.manual_seed(step)
        loss, numbers = wrapped.forward(make_batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert numbers["geom_alpha"] != pytest.approx(0.1, abs=1e-6)
    assert numbers["geom_grad_norm"] > 0
    expected = loss_and_chunk(wrapped, make_batch())
    wrapped.save_pretrained(tmp_path / "lora")

    again = PI05GeometryPolicy.from_pretrained(tmp_path / "base", config=config)
    reloaded = peft.PeftModel.from_pretrained(again, tmp_path / "lora")
    for ours, theirs in zip(loss_and_chunk(reloaded, make_batch()), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(loss_and_chunk(base, make_batch())[0], expected[0])


def test_modules_to_train_in_full_must_name_the_adapter() -> None:
    policy = make_policy()
    policy.config.pretrained_path = "base"
    assert policy._get_default_peft_targets()["modules_to_save"] == ["geometry_adapter"]
    policy._validate_peft_config(types.SimpleNamespace(modules_to_save=["action_in_proj", "geometry_adapter"]))
    for modules in (None, ["action_in_proj"]):
        with pytest.raises(UserInputError, match="geometry_adapter"):
            policy._validate_peft_config(types.SimpleNamespace(modules_to_save=modules))
    plain = make_policy(use_geom_prefix=False)
    assert plain._get_default_peft_targets()["modules_to_save"] == []


# Inference


class FakeEncoder:
    """Geometry that tells which pictures it was made of."""

    made: list["FakeEncoder"]
    network: torch.nn.Module

    def __init__(self, spec: GeometrySpec, model: str | None, device: torch.device) -> None:
        self.spec, self.model, self.device = spec, model, device
        self.images: list[list[torch.Tensor]] = []
        FakeEncoder.made.append(self)

    @classmethod
    def from_spec(cls, spec: GeometrySpec, *, model: str | None = None, device: Any = None) -> "FakeEncoder":
        return cls(spec, model, device)

    def encode(self, images: list[torch.Tensor]) -> Geometry:
        self.images.append(images)
        means = torch.stack([view.float().mean((1, 2, 3)) for view in images], dim=1)  # [B, V]
        ray = means[:, :, None, None, None].expand(*means.shape, *self.spec.grid_hw, 6) / 255
        return Geometry(ray=ray.half(), ray_conf=torch.ones(ray.shape[:-1]).half())


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> type[FakeEncoder]:
    """Stand in for geomcache.da3.encoder, which would import Depth Anything 3."""
    monkeypatch.setitem(sys.modules, "geomcache.da3.encoder", types.SimpleNamespace(DA3Encoder=FakeEncoder))
    FakeEncoder.made = []
    return FakeEncoder


def test_pictures_are_encoded_exactly_and_together(encoder: type[FakeEncoder]) -> None:
    policy = make_policy(geom_model_id="elsewhere")
    batch = make_batch(3, geometry=False)
    torch.manual_seed(0)
    chunk = policy.predict_action_chunk(batch)
    (made,) = encoder.made
    assert made.spec == make_spec()
    assert made.model == "elsewhere"
    assert made.device == torch.device("cpu")
    (images,) = made.images  # one call for three environments
    for key, view in zip(CAMERAS, images, strict=True):
        assert view.dtype == torch.uint8
        assert view.shape == (3, SIZE, SIZE, 3)
        torch.testing.assert_close(view.permute(0, 3, 1, 2).float() / 255, batch[key], rtol=0, atol=0)
    # What is encoded is what a batch with this geometry gives.
    torch.manual_seed(0)
    assert torch.equal(chunk, policy.predict_action_chunk(batch | made.encode(images).to_batch()))
    assert len(made.images) == 2  # the second was ours: a batch that brings geometry is not encoded


def test_once_a_chunk(encoder: type[FakeEncoder]) -> None:
    policy = make_policy(n_action_steps=2)
    for _ in range(6):
        assert policy.select_action(make_batch(geometry=False)).shape == (2, ACTION_DIM)
    (made,) = encoder.made
    assert len(made.images) == 3
    policy.reset()  # a new episode keeps the encoder
    policy.select_action(make_batch(geometry=False))
    assert len(encoder.made) == 1
    assert len(made.images) == 4


def test_under_lerobots_inference_mode(encoder: type[FakeEncoder]) -> None:
    policy = make_policy()
    with torch.inference_mode():
        policy.select_action(make_batch(geometry=False))
    assert len(encoder.made[0].images) == 1


def test_uint8_pictures_are_taken_as_they_are(encoder: type[FakeEncoder]) -> None:
    policy = make_policy()
    batch = make_batch(geometry=False)
    whole = batch | {key: (batch[key] * 255).round().to(torch.uint8) for key in CAMERAS}
    policy.geometry_of(batch)
    policy.geometry_of(whole)
    for first, second in zip(*encoder.made[0].images, strict=True):
        assert torch.equal(first, second)


def test_all_byte_values_come_back() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(values.float() / 255, "camera"), values)
    assert torch.equal(to_uint8(torch.from_numpy(values.numpy() / 255), "camera"), values)  # float64
    assert to_uint8(values, "camera") is values


def test_float16_comes_back_where_it_rounds_back_exactly() -> None:
    """Every float16 number from 0 to 1: those that NumPy rounds a multiple of 1/255 to are taken."""
    halves = torch.arange(0x3C01, dtype=torch.int16).view(torch.float16)
    taken = dict(zip((np.arange(256, dtype=np.float32) / 255).astype(np.float16).tolist(), range(256), strict=True))
    assert len(taken) == 256
    for half in halves:
        if half.item() in taken:
            assert to_uint8(half[None], "camera").tolist() == [taken[half.item()]]
        else:
            with pytest.raises(GeometryError, match="float16"):
                to_uint8(half[None], "camera")


def test_float16_pictures_give_the_geometry_of_the_same_bytes(encoder: type[FakeEncoder]) -> None:
    policy, batch = make_policy(), make_batch(geometry=False)
    policy.geometry_of(batch)
    policy.geometry_of(batch | {key: batch[key].half() for key in CAMERAS})
    for first, second in zip(*encoder.made[0].images, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    "pictures",
    [
        torch.rand(1, 3, 4, 4),
        torch.full((1, 3, 4, 4), -1.0),
        torch.full((1, 3, 4, 4), 255.0),
        torch.full((1, 3, 4, 4), math.nan),
        (torch.arange(256).reshape(1, 1, 16, 16) / 255).to(torch.bfloat16),
        torch.full((1, 3, 4, 4), math.nan, dtype=torch.float16),
        torch.full((1, 3, 4, 4), 255.0, dtype=torch.float16),
    ],
    ids=["resized", "normalised", "bytes as floats", "nan", "bfloat16", "nan in float16", "bytes in float16"],
)
def test_pictures_that_are_not_8_bit_are_refused(pictures: torch.Tensor) -> None:
    with pytest.raises(GeometryError, match="camera front: .*uint8"):
        to_uint8(pictures, "front")


def test_missing_camera_names_both(encoder: type[FakeEncoder]) -> None:
    batch = make_batch(geometry=False)
    batch["observation.images.top"] = batch.pop(CAMERAS[1])
    with pytest.raises(GeometryError, match=r"images\.wrist: .*front, .*images\.top"):
        make_policy().geometry_of(batch)
    assert encoder.made == []


def test_another_size_names_both_and_can_be_allowed(encoder: type[FakeEncoder]) -> None:
    policy = make_policy()
    batch = make_batch(geometry=False)
    batch |= {key: torch.zeros(2, 3, 24, 32) for key in CAMERAS}
    with pytest.raises(GeometryError, match=r"images\.front: .*16x16 .*24x32"):
        policy.predict_action_chunk(batch)
    assert encoder.made == []
    policy.allow_resize = True
    policy.predict_action_chunk(batch)
    (made,) = encoder.made
    assert [(camera.height, camera.width) for camera in made.spec.cameras] == [(24, 32)] * 2
    assert made.images[0][0].shape == (2, 24, 32, 3)


def test_channels_last_pictures_are_refused(encoder: type[FakeEncoder]) -> None:
    batch = make_batch(geometry=False)
    batch[CAMERAS[0]] = batch[CAMERAS[0]].permute(0, 2, 3, 1)
    with pytest.raises(GeometryError, match=r"\[B, 3, H, W\], .*\[2, 16, 16, 3\]"):
        make_policy().geometry_of(batch)


def test_the_encoder_is_no_part_of_the_policy(encoder: type[FakeEncoder]) -> None:
    policy = make_policy()
    keys = set(policy.state_dict())
    policy.predict_action_chunk(make_batch(geometry=False))
    assert policy.online.encoder is encoder.made[0]
    policy.online.encoder.network = torch.nn.Linear(1, 1)
    assert set(policy.state_dict()) == keys
    assert policy.online.encoder.network not in list(policy.modules())
    twin = copy.deepcopy(policy)
    assert torch.equal(loss_and_chunk(twin, make_batch())[1], loss_and_chunk(policy, make_batch())[1])
    for online in (twin.online, pickle.loads(pickle.dumps(policy.online))):
        assert online.encoder is None
        assert online.spec == policy.online.spec


def test_threads_share_a_policy_without_mixing_geometry_up(
    encoder: type[FakeEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """LeRobot evaluates tasks in threads: each gets the action of its own geometry, and the encoder is loaded once."""
    policy = make_policy(n_action_steps=1, geom_init_alpha=1.0)
    noise = torch.randn(1, CHUNK, ACTION_DIM, generator=torch.Generator().manual_seed(3))
    policy.model.sample_noise = lambda *_: noise.clone()
    tasks = 4
    batches = [
        make_batch(1, geometry=False)
        | {key: torch.full((1, 3, SIZE, SIZE), 60 * task, dtype=torch.uint8) for key in CAMERAS}
        for task in range(tasks)
    ]
    expected = [policy.select_action(batch) for batch in batches]
    assert len({tuple(action.flatten().tolist()) for action in expected}) == tasks
    policy.online = OnlineEncoder(policy.online.spec, None)
    encoder.made.clear()
    load, meeting = encoder.from_spec, threading.Barrier(tasks)

    def load_slowly(*args: Any, **kwargs: Any) -> FakeEncoder:
        time.sleep(0.2)
        return load(*args, **kwargs)

    monkeypatch.setattr(encoder, "from_spec", load_slowly)

    def act(number: int) -> list[torch.Tensor]:
        policy.reset()
        meeting.wait()
        return [policy.select_action(batches[number]) for _ in range(10)]

    with ThreadPoolExecutor(tasks) as threads:
        acted = list(threads.map(act, range(tasks)))
    assert len(encoder.made) == 1
    for actions, right in zip(acted, expected, strict=True):
        for action in actions:
            torch.testing.assert_close(action, right, rtol=1e-5, atol=1e-6)


def test_one_action_a_chunk_is_lerobots_first_action() -> None:
    policy, queued = make_policy(n_action_steps=1), make_policy(n_action_steps=2)
    actions = []
    for one in (policy, queued):
        torch.manual_seed(4)
        actions.append(one.select_action(make_batch()))
    assert torch.equal(*actions)
    assert len(policy._action_queue) == 0


def test_geometry_that_was_cast_is_refused_in_training() -> None:
    batch = make_batch() | {key: value.bfloat16() for key, value in make_geometry().to_batch().items()}
    with pytest.raises(GeometryError, match=r"float16 .*bfloat16.*--policy\.dtype=float32"):
        make_policy().forward(batch)


def test_without_geometry_prefix_nothing_is_encoded(encoder: type[FakeEncoder]) -> None:
    make_policy(use_geom_prefix=False).predict_action_chunk(make_batch(geometry=False))
    assert encoder.made == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Depth Anything 3 imports
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_with_depth_anything_3_itself(random_da3_folder: Path) -> None:
    from geomcache.da3.encoder import DA3Encoder

    cameras = make_spec().cameras
    direct = DA3Encoder.from_pretrained(str(random_da3_folder), cameras=cameras, process_res=56, grid="4x4")
    policy = make_policy(spec=direct.spec, geom_model_id=str(random_da3_folder))
    batch = make_batch(geometry=False)
    with torch.inference_mode():  # as LeRobot evaluates
        chunk = sampled_chunk(policy, batch)
    images = [(batch[key] * 255).round().to(torch.uint8).permute(0, 2, 3, 1) for key in CAMERAS]
    expected = direct.encode(images)
    for name, values in policy.geometry_of(batch).items():
        assert torch.equal(values, getattr(expected, name))
    assert torch.equal(chunk, sampled_chunk(policy, batch | expected.to_batch()))
    assert policy.online.encoder.calls == 2

    # Another size, where that is allowed: resized from that size by DA3's own preprocessing.
    resizing = make_policy(spec=direct.spec, geom_model_id=str(random_da3_folder))
    resizing.allow_resize = True
    larger = batch | {key: torch.zeros(1, 3, 40, 40, dtype=torch.uint8) for key in CAMERAS}
    assert resizing.geometry_of(larger).ray.shape == (1, 2, 4, 4, 6)

    # Other weights than the cache's are an error that names both.
    other = dataclasses.replace(direct.spec, weights_sha256="ab" * 32)
    wrong = make_policy(spec=other, geom_model_id=str(random_da3_folder))
    with pytest.raises(ModelError, match=f"sha256 {'ab' * 32}, found {direct.spec.weights_sha256}"):
        wrong.predict_action_chunk(batch)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Depth Anything 3 imports
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_policy_whose_encoder_cannot_be_compiled_acts_as_an_eager_one(
    random_da3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from geomcache.da3.encoder import DA3Encoder

    def failing(*_: Any, **__: Any) -> Callable[..., Any]:
        def run(*_: Any) -> None:
            raise RuntimeError("no compiler")

        return run

    cameras = make_spec().cameras
    spec = DA3Encoder.from_pretrained(str(random_da3_folder), cameras=cameras, process_res=56, grid="4x4").spec
    eager, compiled = (
        make_policy(spec=spec, geom_model_id=str(random_da3_folder), geom_engine=engine)
        for engine in ("eager", "compiled")
    )
    batch = make_batch(geometry=False)
    monkeypatch.setattr(torch, "compile", failing)
    with logged_lines() as lines, torch.inference_mode():
        chunks = [sampled_chunk(policy, batch) for policy in (eager, compiled)]
        again = sampled_chunk(compiled, batch)
    assert [line for line in lines if "no compiler" in line] == [lines[-1]]
    assert torch.equal(chunks[0], chunks[1])
    assert torch.equal(chunks[0], again)
    assert compiled.online is not None
    assert compiled.online.encoder is not None
    assert (compiled.online.encoder.engine, compiled.online.encoder.calls) == ("eager", 2)
    assert copy.deepcopy(compiled).online.engine == "compiled"  # a copy tries again


def sampled_chunk(policy: PI05GeometryPolicy, batch: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)
    return policy.predict_action_chunk(batch)


# The seams into LeRobot that this file's subjects hang on


def test_lerobot_still_passes_sampling_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_plain_policy(monkeypatch)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        policy.model, "sample_actions", lambda *args, **kwargs: seen.update(kwargs) or torch.zeros(2, CHUNK, 3)
    )
    policy.predict_action_chunk(make_batch(), extra_prefix_embs="a")
    assert seen["extra_prefix_embs"] == "a"


def test_lerobot_still_takes_the_prefix_from_embed_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_plain_policy(monkeypatch)
    calls = []
    original = policy.model.embed_prefix

    def embed(images: Any, img_masks: Any, tokens: Any, masks: Any, *more: Any) -> Any:
        calls.append((len(images), len(img_masks), tokens.shape, masks.dtype))
        embs, pads, atts = original(images, img_masks, tokens, masks, *more)
        assert embs.shape[:2] == pads.shape == atts.shape
        assert pads.dtype == atts.dtype == torch.bool
        return embs, pads, atts

    monkeypatch.setattr(policy.model, "embed_prefix", embed)
    loss_and_chunk(policy, make_batch())
    assert calls == [(2, 2, (2, TEXT), torch.bool)] * 2


def test_a_policy_has_all_that_lerobots_constructor_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours replaces LeRobot's constructor. What a later LeRobot adds to it would be missing here."""
    options = {"rtc_config": RTCConfig(), "gradient_checkpointing": True}
    plain, policy = make_plain_policy(monkeypatch, **options), make_policy(**options)
    assert vars(policy).keys() - vars(plain).keys() == {
        *("allow_resize", "online", "_adapter_grad_norm", "_spec"),
    }
    assert vars(plain).keys() <= vars(policy).keys()
    assert vars(policy.model).keys() - vars(plain.model).keys() == {"hidden_states"}
    assert vars(plain.model).keys() <= vars(policy.model).keys()
    children = dict(policy.model.named_children()).keys()
    assert children - {"geometry_adapter"} == dict(plain.model.named_children()).keys()
    assert policy.model.gradient_checkpointing_enabled
    assert policy.model.rtc_processor is policy.rtc_processor is not None


@functools.cache
def full_size_names() -> frozenset[str]:
    """Names of LeRobot's full network, without memory."""
    with torch.device("meta"):
        network = modeling_pi05.PI05Pytorch(modeling_pi05.PI05Config(device="cpu"))
    return frozenset(network.state_dict())


def test_the_small_variant_has_the_full_ones_names() -> None:
    def short(names: Any) -> set[str]:  # layers are numbered: the small one has fewer
        return {".".join("N" if part.isdigit() else part for part in name.split(".")) for name in names}

    policy = make_policy()
    small = {name for name in policy.model.state_dict() if not name.startswith("geometry_adapter.")}
    assert short(small) == short(full_size_names())
    assert not [name for name, value in policy.state_dict().items() if value.is_meta]
    assert not [name for name, value in policy.named_buffers() if value.is_meta]
    count = sum(parameter.numel() for parameter in policy.parameters())
    assert 2_000_000 < count < 3_000_000


def test_small_policies_follow_their_options() -> None:
    policy = make_policy(max_action_dim=5, image_resolution=(56, 56), freeze_vision_encoder=True)
    assert policy.model.action_in_proj.in_features == policy.model.action_out_proj.out_features == 5
    network = policy.model.paligemma_with_expert
    assert network.embed_image(torch.zeros(1, 3, 56, 56)).shape == (1, 16, 128)
    assert not any(p.requires_grad for p in network.paligemma.model.vision_tower.parameters())
    assert loss_and_chunk(policy, make_batch())[1].shape == (2, CHUNK, ACTION_DIM)
    assert np.isfinite(loss_and_chunk(policy, make_batch())[0].item())
