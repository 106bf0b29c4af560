"""The alignment loss: against its formula, against plain Pi0.5, and with what LeRobot's trainer does to a policy."""

import copy
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.policies.pi05 import modeling_pi05
from numpy.typing import NDArray

from geomcache.adapter import channel_statistics
from geomcache.errors import UserInputError
from geomcache.geometry import Geometry
from geomcache.policy.alignment import GeometryProjector, confidence_weights, geometry_target
from geomcache.policy.gradients import compare_gradients, shared_parameters
from geomcache.policy.image_tokens import PictureArea
from geomcache.policy.modeling_pi05_geometry import PI05GeometryPolicy
from geomcache.policy.small_paligemma import SMALL_GEMMA
from tests.support.policy import (
    CAMERAS,
    GRID,
    IMAGE_TOKENS,
    loss_and_chunk,
    make_batch,
    make_config,
    make_geometry,
    make_plain_policy,
    make_policy,
    make_spec,
    make_statistics,
)

ALL = ("ray", "ray_conf", "depth", "depth_conf")
LAYER = 3  # two thirds of the small model's 4
PROJECTOR = "model.geometry_projector."


def aligned(**options: Any) -> Any:
    return make_policy(geom_mode="align", **options).train()


def with_weights(policy: Any, other: Any) -> Any:
    """Give a policy the weights of another one where they have the same names."""
    policy.load_state_dict(
        {name: v for name, v in other.state_dict().items() if name in policy.state_dict()}, strict=False
    )
    return policy


def run(policy: Any, batch: dict[str, Any], **options: Any) -> tuple[Any, dict[str, Any]]:
    """Loss and numbers, with the same noise at every call."""
    torch.manual_seed(5)
    loss, numbers = policy.forward(batch, **options)
    return loss, numbers


def gradients(policy: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    run(policy, batch)[0].backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


# The loss against its formula


def triangle(size: int, target: int) -> NDArray[np.float64]:
    """[target, size]: a triangle as wide as a target cell, at least as wide as a source cell, cut at the border."""
    scale = size / target
    distance = np.abs(np.arange(size)[None] + 0.5 - (np.arange(target)[:, None] + 0.5) * scale) / max(scale, 1.0)
    weights = np.clip(1.0 - distance, 0.0, None)
    normalised: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return normalised


def by_formula(policy: Any, hidden: NDArray[np.float64], geometry: Geometry) -> float:
    """The published projector, fc(gelu(fc(LayerNorm(h)))), and the squared error weighted by confidence, in float64."""
    state = {name: value.double().numpy() for name, value in policy.state_dict().items()}
    norm_w, norm_b, w1, b1, w2, b2 = (
        state[f"{PROJECTOR}{part}"]
        for part in ("norm.weight", "norm.bias", "hidden.weight", "hidden.bias", "output.weight", "output.bias")
    )
    centered = hidden - hidden.mean(-1, keepdims=True)
    normed = centered / np.sqrt(centered.var(-1, keepdims=True) + 1e-5) * norm_w + norm_b
    inner = normed @ w1.T + b1
    erf = np.vectorize(math.erf)
    predicted = (inner * 0.5 * (1 + erf(inner / math.sqrt(2)))) @ w2.T + b2  # [B, V, n, C]
    values, weights = [], []
    maps = {name: array.numpy().astype(np.float64) for name, array in geometry.items()}
    for name, array in maps.items():
        wide = array.reshape(*array.shape[:4], -1)
        is_confidence = name.endswith("_conf")
        wide = np.log(wide) if is_confidence else wide
        moments = make_statistics(make_spec(tuple(maps)))[name]
        values.append((wide - np.array(moments.mean)) / np.array(moments.std))
        weight = np.ones(array.shape[:4]) if is_confidence else 1 - 1 / maps[f"{name}_conf"]
        weights.append(np.repeat(weight[..., None], wide.shape[-1], axis=-1))
    side = math.isqrt(IMAGE_TOKENS)
    rows, columns = triangle(GRID[0], side), triangle(GRID[1], side)
    target, weight = (
        np.einsum("yh,xw,bvhwc->bvyxc", rows, columns, np.concatenate(parts, -1)).reshape(predicted.shape)
        for parts in (values, weights)
    )
    return float((weight * (predicted - target) ** 2).sum() / weight.sum())


@pytest.mark.parametrize("outputs", [("ray", "ray_conf"), ALL])
def test_the_loss_is_the_formulas(monkeypatch: pytest.MonkeyPatch, outputs: tuple[str, ...]) -> None:
    after: list[torch.Tensor] = []
    compute = modeling_pi05.compute_layer_complete

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = compute(*args, **kwargs)
        after.append(result[0].detach())
        return result

    monkeypatch.setattr(modeling_pi05, "compute_layer_complete", watched)
    policy = aligned(spec=make_spec(outputs), geom_align_weight=0.25)
    geometry = make_geometry(outputs=outputs)
    loss, numbers = run(policy, make_batch() | geometry.to_batch())
    hidden = after[LAYER - 1][:, : 2 * IMAGE_TOKENS].double().numpy().reshape(2, 2, IMAGE_TOKENS, -1)
    expected = by_formula(policy, hidden, geometry)
    assert numbers["geom_align_loss"] == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(numbers["geom_action_loss"] + 0.25 * expected, rel=1e-5)
    assert numbers["loss"] == pytest.approx(loss.item(), rel=1e-6)
    other = aligned(spec=make_spec(outputs), geom_align_layer=2)
    _, at_layer_2 = run(other, make_batch() | geometry.to_batch())
    hidden = after[LAYER + 2][:, : 2 * IMAGE_TOKENS].double().numpy().reshape(2, 2, IMAGE_TOKENS, -1)
    assert at_layer_2["geom_align_loss"] != pytest.approx(expected, rel=1e-3)


def test_r2_by_hand() -> None:
    statistics = make_statistics(make_spec())
    projector = GeometryProjector(statistics=statistics, width=8)
    areas = [PictureArea.of(16, 16, 28)] * 2
    target = projector.target(make_geometry(), areas)
    weights, values = (part.double().numpy().reshape(-1, 7) for part in (target.weights, target.values))
    mean = (weights * values).sum(0) / weights.sum(0)
    with torch.no_grad():
        projector.output.weight.zero_()
        projector.output.bias.copy_(torch.from_numpy(mean))
    assert projector.align(torch.zeros(2, 2, 4, 8), target).r2.item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        projector.output.bias.add_(1.0)
    spread = (weights * (values - mean) ** 2).sum()
    shifted = projector.align(torch.zeros(2, 2, 4, 8), target)
    assert shifted.r2.item() == pytest.approx(1 - (weights * (values - mean - 1) ** 2).sum() / spread, rel=1e-5)


def test_confidence_weighs_rays_and_depths_and_not_itself() -> None:
    geometry = make_geometry(outputs=ALL)
    weights = confidence_weights(geometry)
    assert weights.shape == (2, 2, *GRID, 9)
    assert geometry.ray_conf is not None
    assert geometry.depth_conf is not None
    ray_conf, depth_conf = geometry.ray_conf.float(), geometry.depth_conf.float()
    logistic = torch.sigmoid((ray_conf - 1).log())  # confidence = 1 + exp(x)
    torch.testing.assert_close(weights[..., 0], logistic)
    torch.testing.assert_close(weights[..., 5], logistic)
    torch.testing.assert_close(weights[..., 7], torch.sigmoid((depth_conf - 1).log()))
    assert torch.equal(weights[..., 6], torch.ones_like(ray_conf))
    assert torch.equal(weights[..., 8], torch.ones_like(ray_conf))
    assert torch.equal(confidence_weights(Geometry(ray=geometry.ray)), torch.ones(2, 2, *GRID, 6))


def test_each_samples_loss_is_its_part_of_the_mean() -> None:
    policy = aligned()
    mean, _ = run(policy, make_batch(3))
    each, _ = run(policy, make_batch(3), reduction="none")
    assert each.shape == (3,)
    torch.testing.assert_close(each.mean(), mean)
    assert len(set(each.tolist())) == 3


# Plain Pi0.5


def test_weight_zero_is_plain_to_the_bit_in_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_plain_policy(monkeypatch).train()
    policy = with_weights(aligned(geom_align_weight=0.0), plain)
    assert torch.equal(run(plain, make_batch())[0], run(policy, make_batch())[0])
    theirs, ours = gradients(plain, make_batch()), gradients(policy, make_batch())
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        assert torch.equal(ours[name], gradient), name
    _, numbers = run(policy, make_batch())
    assert numbers["geom_align_loss"] > 0  # it is measured
    assert numbers["loss"] == numbers["geom_action_loss"]


def test_the_network_runs_as_plain_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_plain_policy(monkeypatch)
    policy = with_weights(aligned(), plain)
    assert dict(plain.named_parameters()).keys() == {
        name for name, _ in policy.named_parameters() if not name.startswith(PROJECTOR)
    }
    assert run(policy, make_batch())[1]["geom_action_loss"] == run(plain, make_batch())[0].item()
    theirs, ours = loss_and_chunk(plain, make_batch()), loss_and_chunk(policy.eval(), make_batch())
    assert torch.equal(ours[0], theirs[0])  # of held-out batches: the action loss alone
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(loss_and_chunk(policy, make_batch())[1], loss_and_chunk(policy, make_batch(seed=1))[1])
    assert policy.online is None


def test_both_has_the_tokens_of_prefix_and_the_loss() -> None:
    prefix = make_policy()
    both = with_weights(make_policy(geom_mode="both"), prefix)
    assert torch.equal(loss_and_chunk(both, make_batch())[1], loss_and_chunk(prefix, make_batch())[1])
    both, prefix = both.train(), prefix.train()
    loss, numbers = run(both, make_batch())
    plain_loss, plain_numbers = run(prefix, make_batch())
    assert numbers["geom_action_loss"] == plain_loss.item()
    assert loss.item() == pytest.approx(plain_loss.item() + 0.5 * numbers["geom_align_loss"], rel=1e-6)
    assert plain_numbers.keys() - {"loss"} < numbers.keys()
    found = gradients(both, make_batch())
    for name in ("model.geometry_adapter.projection.weight", f"{PROJECTOR}hidden.weight"):
        assert found[name].abs().sum() > 0


# What the loss reaches


def test_the_loss_reaches_layers_before_it_and_none_behind() -> None:
    policy = aligned()
    action = gradients(with_weights(make_policy(use_geom_prefix=False).train(), policy), make_batch())
    ours = gradients(policy, make_batch())
    moved = {name for name, gradient in action.items() if not torch.equal(gradient, ours[name])}
    language = "model.paligemma_with_expert.paligemma.model.language_model.layers"
    for layer in range(LAYER):
        assert f"{language}.{layer}.mlp.down_proj.weight" in moved
    assert not [name for name in moved if f"{language}.{LAYER}." in name or "gemma_expert" in name]
    assert [name for name in moved if "vision_tower" in name]


def test_no_gradient_leads_into_the_target() -> None:
    batch = make_batch()
    for key in ("observation.geometry.ray", "observation.geometry.ray_conf"):
        batch[key] = batch[key].float().requires_grad_()
    run(aligned(), batch)[0].backward()
    assert batch["observation.geometry.ray"].grad is None
    target = geometry_target(
        Geometry.from_batch(batch), *channel_statistics(make_statistics(make_spec())), [PictureArea.of(16, 16, 28)] * 2
    )
    assert not target.values.requires_grad
    assert not target.weights.requires_grad


def test_gradient_checkpointing_changes_nothing() -> None:
    plain = gradients(aligned(), make_batch())
    checkpointed = gradients(aligned(gradient_checkpointing=True), make_batch())
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_a_policy_whose_paligemma_is_frozen_is_refused() -> None:
    policy = aligned()
    for parameter in policy.model.paligemma_with_expert.paligemma.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UserInputError, match=r"first 3 layers .*--peft\.target_modules"):
        policy.forward(make_batch())
    with pytest.raises(UserInputError, match="train_expert_only"):
        make_config(geom_mode="align", train_expert_only=True)
    found = gradients(aligned(freeze_vision_encoder=True), make_batch())
    assert found[f"{PROJECTOR}hidden.weight"].abs().sum() > 0


# Masks


def test_a_camera_that_the_batch_lacks_counts_nothing() -> None:
    batch = make_batch()
    del batch[CAMERAS[0]]
    policy = aligned()
    before = run(policy, batch)[1]["geom_align_loss"]
    batch["observation.geometry.ray"][:, 0] += 1
    assert run(policy, batch)[1]["geom_align_loss"] == before
    batch["observation.geometry.ray"][:, 1] += 1
    assert run(policy, batch)[1]["geom_align_loss"] != before


def test_empty_cameras_are_no_views() -> None:
    without, with_one = run(aligned(), make_batch())[1], run(aligned(empty_cameras=1), make_batch())[1]
    assert with_one["geom_align_loss"] == pytest.approx(without["geom_align_loss"], rel=1e-5)


def test_padding_of_a_wide_picture_counts_nothing() -> None:
    areas = [PictureArea.of(60, 120, 112)] * 2
    target = geometry_target(make_geometry(), *channel_statistics(make_statistics(make_spec())), areas)
    known = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0], dtype=torch.bool)[:, None].expand(8, 8).flatten()
    assert torch.equal(target.known, known.expand(2, 2, 64))
    assert torch.equal(target.weights.sum(-1) > 0, target.known)


def test_cells_without_a_value_count_nothing() -> None:
    geometry = make_geometry()
    policy, batch = aligned(), make_batch()
    everywhere = torch.ones(2, 2, *GRID, dtype=torch.bool)
    whole = run(policy, batch)[1]["geom_align_loss"]
    assert run(policy, batch | {"observation.geometry.valid": everywhere})[1]["geom_align_loss"] == pytest.approx(
        whole, rel=1e-6
    )
    holes = everywhere.clone()
    holes[:, :, :, 0] = False
    holes[0, 1] = False  # all of a view
    with_holes = run(policy, batch | {"observation.geometry.valid": holes})[1]
    other = geometry.ray.clone()
    other[~holes] = 100.0
    masked = batch | {"observation.geometry.ray": other, "observation.geometry.valid": holes}
    assert run(policy, masked)[1]["geom_align_loss"] == with_holes["geom_align_loss"] != whole
    nothing = run(policy, batch | {"observation.geometry.valid": torch.zeros_like(everywhere)})[1]
    assert nothing["geom_align_loss"] == 0
    assert all(math.isfinite(value) for value in nothing.values() if isinstance(value, float))


# What is logged of the gradients


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients_of_both_losses_are_compared_where_it_is_asked_for(gradient_checkpointing: bool) -> None:
    policy = aligned(gradient_checkpointing=gradient_checkpointing)
    assert "geom_grad_angle" not in run(policy, make_batch())[1]
    policy.measures_gradients = True
    loss, numbers = run(policy, make_batch())
    loss.backward()  # the graph is still there
    both = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    names = [n for n, _ in policy.named_parameters() if f"paligemma.model.language_model.layers.{LAYER - 1}." in n]
    action = gradients(with_weights(make_policy(use_geom_prefix=False).train(), policy), make_batch())
    first = torch.cat([action[name].flatten() for name in names]).double()
    second = torch.cat([both[name].flatten() for name in names]).double() - first
    angle = math.degrees(math.acos(float(first @ second / first.norm() / second.norm())))
    assert numbers["geom_action_grad"] == pytest.approx(first.norm().item(), rel=1e-4)
    assert numbers["geom_align_grad"] == pytest.approx(second.norm().item(), rel=1e-4)
    assert numbers["geom_grad_angle"] == pytest.approx(angle, rel=1e-3)
    policy.eval()
    assert "geom_grad_angle" not in run(policy, make_batch())[1]


def test_angles_by_hand() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    first, second = (weight * torch.tensor([3.0, 0.0])).sum(), (weight * torch.tensor([1.0, 1.0])).sum()
    assert [x.item() for x in compare_gradients(first, second, [weight])] == pytest.approx([3, math.sqrt(2), 45])
    assert compare_gradients(first, -second, [weight])[2].item() == pytest.approx(135)
    assert compare_gradients(first, 0 * second, [weight])[2].item() == pytest.approx(90)


def test_the_shared_part_is_the_last_one_that_is_trained() -> None:
    policy = aligned()
    network = policy.model.paligemma_with_expert
    model = network.paligemma.model

    def freeze(part: torch.nn.Module) -> None:
        for parameter in part.parameters():
            parameter.requires_grad_(False)

    def is_of(part: torch.nn.Module) -> bool:
        return {id(p) for p in shared_parameters(network, LAYER)} == {id(p) for p in part.parameters()}

    assert is_of(model.language_model.layers[LAYER - 1])
    freeze(model.language_model.layers[LAYER - 1])
    assert is_of(model.language_model.layers[LAYER - 2])
    freeze(model.language_model)
    assert is_of(model.multi_modal_projector)
    freeze(model.multi_modal_projector)
    assert is_of(model.vision_tower)
    freeze(model.vision_tower)
    assert shared_parameters(network, LAYER) == []


# LeRobot's other modes


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's, hidden outside of tests
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_compiled_model_gives_the_same(monkeypatch: pytest.MonkeyPatch, gradient_checkpointing: bool) -> None:
    from tests.support.policy import build_policy

    options: dict[str, Any] = {
        "geom_mode": "align",
        "num_inference_steps": 1,
        "gradient_checkpointing": gradient_checkpointing,
    }
    eager = make_policy(**options).train()
    with monkeypatch.context() as patch:
        patch.setattr(modeling_pi05.torch, "compile", lambda function, **_: torch._dynamo.optimize("eager")(function))
        compiled = build_policy(compile_model=True, **options).train()
    for seed in (1, 2):  # a graph that had kept the first hidden states would fail the second time
        ours, theirs = run(compiled, make_batch(seed=seed)), run(eager, make_batch(seed=seed))
        torch.testing.assert_close(ours[0], theirs[0])
        assert ours[1]["geom_align_loss"] == pytest.approx(theirs[1]["geom_align_loss"], rel=1e-5)
    found, expected = gradients(compiled, make_batch()), gradients(eager, make_batch())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name, rtol=1e-4, atol=1e-5)


def test_bfloat16() -> None:
    policy = aligned(dtype="bfloat16")
    policy.measures_gradients = True
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as LeRobot trains with this dtype
        loss, numbers = run(policy, make_batch())
    loss.backward()
    assert policy.model.geometry_projector.hidden.weight.dtype == torch.float32
    assert policy.model.geometry_projector.hidden.weight.grad.abs().sum() > 0
    assert all(math.isfinite(value) for value in numbers.values() if isinstance(value, float))
    exact = run(aligned(), make_batch())[1]["geom_align_loss"]
    assert numbers["geom_align_loss"] == pytest.approx(exact, rel=0.05)


def test_lora_trains_paligemma_and_reloads_the_projector(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs the package peft")
    make_policy(geom_mode="align").save_pretrained(tmp_path / "base")
    config = make_config(geom_mode="align", pretrained_path=tmp_path / "base")
    policy = PI05GeometryPolicy.from_pretrained(tmp_path / "base", config=config)
    wrapped = policy.wrap_with_peft(peft_cli_overrides={"r": 4})
    trainable = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    for part in ("gemma_expert", "paligemma.model.language_model.layers.0."):
        assert any("lora_A" in name and part in name for name in trainable)
    assert any("geometry_projector" in name for name in trainable)
    wrapped.train()
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(wrapped.get_optim_params(), lr=1e-3)
    for step in range(2):
        torch.manual_seed(step)
        wrapped.forward(make_batch())[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in wrapped.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert any("lora_B" in name and "language_model.layers.0." in name for name in moved)
    expected = run(wrapped, make_batch())[1]
    wrapped.save_pretrained(tmp_path / "lora")
    again = PI05GeometryPolicy.from_pretrained(tmp_path / "base", config=config)
    reloaded = peft.PeftModel.from_pretrained(again, tmp_path / "lora", is_trainable=True).train()
    assert run(reloaded, make_batch())[1]["geom_align_loss"] == expected["geom_align_loss"]


def test_a_copy_has_hidden_states_of_its_own() -> None:
    policy = aligned()
    twin = copy.deepcopy(policy)
    with torch.no_grad():
        twin.model.paligemma_with_expert.paligemma.model.language_model.layers[0].mlp.down_proj.weight.zero_()
    before = run(policy, make_batch())[1]["geom_align_loss"]
    assert run(twin, make_batch())[1]["geom_align_loss"] != before
    assert run(policy, make_batch())[1]["geom_align_loss"] == before


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"geom_mode": "alined"}, "geom_mode: .*prefix, align, both, got 'alined'"),
        ({"geom_align_weight": -1.0}, "geom_align_weight"),
        ({"geom_align_weight": math.nan}, "geom_align_weight"),
        ({"geom_align_layer": 0}, "geom_align_layer: expected 1 to 4"),
        ({"geom_align_layer": 5}, "geom_align_layer: expected 1 to 4"),
        ({"geom_mode": "align", "image_resolution": (140, 140)}, "at least 6 cells .*10x10 image tokens.* 4x4"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        make_config(**options)


def test_the_default_layer_is_the_published_one() -> None:
    assert make_config(model_size="full", image_resolution=(224, 224)).align_layer == 12
    assert make_config().align_layer == LAYER
    assert modeling_pi05.get_gemma_config("gemma_2b").depth == 18
    assert SMALL_GEMMA.depth == 4


def test_a_camera_that_the_policy_does_not_see_cannot_be_aligned() -> None:
    config = make_config(geom_mode="align")
    del config.input_features[CAMERAS[1]]
    with pytest.raises(UserInputError, match=CAMERAS[1]):
        PI05GeometryPolicy(config)


# Checkpoints


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    policy = aligned()
    policy.save_pretrained(tmp_path)
    loaded = PI05GeometryPolicy.from_pretrained(tmp_path).train()
    assert json.loads((tmp_path / "config.json").read_text())["geom_mode"] == "align"
    assert torch.equal(run(loaded, make_batch())[0], run(policy, make_batch())[0])


def test_parts_come_and_go_with_the_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_plain_policy(monkeypatch, seed=3).save_pretrained(tmp_path / "plain")
    for before, after, fresh, left_out in (
        ("plain", "align", ["projector"], []),
        ("align", "prefix", ["adapter"], ["projector"]),
        ("prefix", "both", ["projector"], []),
        ("both", "align", [], ["adapter"]),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="geomcache"):
            config = make_config(geom_mode=after)
            policy = PI05GeometryPolicy.from_pretrained(tmp_path / before, config=config)
        for part in ("adapter", "projector"):
            assert (f"the {part} starts fresh" in caplog.text) == (part in fresh)
            assert (f"has a geometry {part}: it is left out" in caplog.text) == (part in left_out)
        policy.save_pretrained(tmp_path / after)


def test_optimizer_gives_the_projector_its_own_rate() -> None:
    policy = aligned(optimizer_lr=1e-3, geom_lr_scale=20.0)
    rest, added = policy.get_optim_params()
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    assert {names[id(p)] for p in added["params"]} == {name for name in names.values() if PROJECTOR in name}
    assert added["lr"] == 20 * 1e-3
    assert len(rest["params"]) + len(added["params"]) == len(names)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Depth Anything 3 imports
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_cached_targets_are_the_online_ones(random_da3_folder: Path) -> None:
    """What extraction caches, in a batch, and what the online encoder gives for one frame: one float16 step apart."""
    from geomcache.da3.encoder import DA3Encoder

    encoder = DA3Encoder.from_pretrained(
        str(random_da3_folder), cameras=make_spec().cameras, process_res=56, grid="4x4"
    )
    pictures = make_batch(3, geometry=False)
    cached = encoder.encode([(pictures[key] * 255).round().to(torch.uint8).permute(0, 2, 3, 1) for key in CAMERAS])
    policy = make_policy(geom_mode="both", spec=encoder.spec, geom_model_id=str(random_da3_folder))
    projector, areas = policy.model.geometry_projector, [PictureArea.of(16, 16, 28)] * 2
    targets = projector.target(cached, areas).values
    for frame in range(3):
        alone = {key: value[frame : frame + 1] for key, value in pictures.items()}
        online = policy.geometry_of(alone)
        for name, values in online.items():
            stored = getattr(cached, name)[frame : frame + 1]
            step_of_each = torch.from_numpy(np.spacing(stored.abs().numpy())).double()
            assert ((values.double() - stored.double()).abs() <= step_of_each).all(), name
        step = max(2.0**-10 * float(getattr(cached, name).abs().max()) for name, _ in cached.items())
        apart = (projector.target(online, areas).values[0] - targets[frame]).abs()
        assert (apart <= step / projector.std).all()


ACT = """
import sys
from geomcache.policy.modeling_pi05_geometry import PI05GeometryPolicy
from tests.support.policy import make_batch

policy = PI05GeometryPolicy.from_pretrained(sys.argv[1])
print(policy.predict_action_chunk(make_batch(geometry=False)).shape, policy.online)
assert not [name for name in sys.modules if name.startswith("depth_anything_3") or name == "geomcache.da3.encoder"]
assert not [name for name in policy.state_dict() if "backbone" in name or "da3" in name]
"""


@pytest.mark.slow
def test_acting_imports_no_da3(tmp_path: Path) -> None:
    aligned().save_pretrained(tmp_path)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", ACT, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "torch.Size([2, 4, 3]) None"
