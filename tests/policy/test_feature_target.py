"""The alignment loss with DA3's features as its target: against the published formula, and what comes and goes."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.policies.pi05 import modeling_pi05
from numpy.typing import NDArray

from geomcache.errors import CacheMismatchError, GeometryError, UserInputError
from geomcache.geometry import DEFAULT_OUTPUTS, Geometry
from geomcache.policy.alignment import feature_target
from geomcache.policy.export import export_plain
from geomcache.policy.image_tokens import PictureArea
from geomcache.policy.modeling_pi05_geometry import PI05GeometryPolicy
from tests.support.geometry import FEATURE_DIM
from tests.support.policy import (
    CAMERAS,
    GRID,
    IMAGE_TOKENS,
    make_batch,
    make_config,
    make_geometry,
    make_plain_policy,
    make_policy,
    make_spec,
)

OUTPUTS = (*DEFAULT_OUTPUTS, "feature")
SPEC = make_spec(OUTPUTS)
LAYER = 3  # two thirds of the small model's 4
PROJECTOR = "model.feature_projector."
FEATURE = "observation.geometry.feature"


def aligned(**options: Any) -> Any:
    defaults: dict[str, Any] = {"geom_mode": "align", "geom_align_target": "feature", "spec": SPEC}
    return make_policy(**(defaults | options)).train()


def batch_of(count: int = 2) -> dict[str, Any]:
    return make_batch(count) | make_geometry(count, outputs=OUTPUTS).to_batch()


def run(policy: Any, batch: dict[str, Any], **options: Any) -> tuple[Any, dict[str, Any]]:
    """Loss and numbers, with the same noise at every call."""
    torch.manual_seed(5)
    loss, numbers = policy.forward(batch, **options)
    return loss, numbers


def triangle(size: int, target: int) -> NDArray[np.float64]:
    """[target, size]: a triangle as wide as a target cell, cut at the border; for as many cells or fewer."""
    scale = size / target
    distance = np.abs(np.arange(size)[None] + 0.5 - (np.arange(target)[:, None] + 0.5) * scale) / scale
    weights = np.clip(1.0 - distance, 0.0, None)
    normalised: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return normalised


def by_formula(policy: Any, hidden: NDArray[np.float64], geometry: Geometry) -> NDArray[np.float64]:
    """The cosines [B, V, n] of fc(gelu(fc(LayerNorm(h)))) and the features on the tokens' cells, in float64."""
    state = {name: value.double().numpy() for name, value in policy.state_dict().items()}
    norm_w, norm_b, w1, b1, w2, b2 = (
        state[f"{PROJECTOR}{part}"]
        for part in ("norm.weight", "norm.bias", "hidden.weight", "hidden.bias", "output.weight", "output.bias")
    )
    centered = hidden - hidden.mean(-1, keepdims=True)
    inner = (centered / np.sqrt(centered.var(-1, keepdims=True) + 1e-5) * norm_w + norm_b) @ w1.T + b1
    predicted = (inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))) @ w2.T + b2  # [B, V, n, D]
    assert geometry.feature is not None
    side = math.isqrt(IMAGE_TOKENS)
    rows, columns = triangle(GRID[0], side), triangle(GRID[1], side)
    maps = geometry.feature.double().numpy()
    target = np.einsum("yh,xw,bvhwc->bvyxc", rows, columns, maps).reshape(predicted.shape)
    lengths = np.linalg.norm(predicted, axis=-1) * np.linalg.norm(target, axis=-1)
    cosines: NDArray[np.float64] = (predicted * target).sum(-1) / lengths
    return cosines


def test_the_loss_is_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    after: list[torch.Tensor] = []
    compute = modeling_pi05.compute_layer_complete

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = compute(*args, **kwargs)
        after.append(result[0].detach())
        return result

    monkeypatch.setattr(modeling_pi05, "compute_layer_complete", watched)
    policy, batch = aligned(geom_align_weight=0.25), batch_of()
    loss, numbers = run(policy, batch)
    hidden = after[LAYER - 1][:, : 2 * IMAGE_TOKENS].double().numpy().reshape(2, 2, IMAGE_TOKENS, -1)
    cosines = by_formula(policy, hidden, Geometry.from_batch(batch))
    assert numbers["geom_align_loss"] == pytest.approx(1 - cosines.mean(), rel=1e-5)
    assert numbers["geom_align_cosine"] == pytest.approx(cosines.mean(), rel=1e-4, abs=1e-6)
    assert loss.item() == pytest.approx(numbers["geom_action_loss"] + 0.25 * (1 - cosines.mean()), rel=1e-5)
    assert "geom_align_r2" not in numbers
    each, _ = run(policy, batch, reduction="none")
    torch.testing.assert_close(each.mean(), loss)


def test_weight_zero_is_plain_to_the_bit_in_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_plain_policy(monkeypatch).train()
    policy = aligned(geom_align_weight=0.0)
    policy.load_state_dict(plain.state_dict(), strict=False)
    losses = [run(each, batch_of())[0] for each in (plain, policy)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    ours = dict(policy.named_parameters())
    for name, parameter in plain.named_parameters():
        gradient = ours[name].grad
        assert (parameter.grad is None) == (gradient is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, gradient), name
    assert all(value.grad is None for name, value in ours.items() if name.startswith(PROJECTOR))
    assert torch.equal(
        *(_chunk(each.eval(), make_batch(geometry=False)) for each in (plain, policy))
    )  # and it acts without features


def _chunk(policy: Any, batch: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(7)
    chunk: torch.Tensor = policy.predict_action_chunk(batch)
    return chunk


def test_no_gradient_leads_into_the_features() -> None:
    batch = batch_of()
    for key in batch:
        if key.startswith("observation.geometry."):
            batch[key] = batch[key].float().requires_grad_()
    policy = aligned()
    run(policy, batch)[0].backward()
    assert batch[FEATURE].grad is None
    assert policy.model.feature_projector.hidden.weight.grad.abs().sum() > 0
    target = feature_target(Geometry.from_batch(batch), [PictureArea.of(16, 16, 28)] * 2)
    assert not target.values.requires_grad


def test_features_count_by_their_direction_alone() -> None:
    policy, batch = aligned(), batch_of()
    before = run(policy, batch)[1]["geom_align_loss"]
    longer = run(policy, batch | {FEATURE: batch[FEATURE] * 4})[1]["geom_align_loss"]
    assert longer == pytest.approx(before, rel=1e-5)
    turned = run(policy, batch | {FEATURE: -batch[FEATURE]})[1]["geom_align_loss"]
    assert turned == pytest.approx(2 - before, rel=1e-5)


def test_padding_missing_cameras_and_cells_without_a_value_count_nothing() -> None:
    known = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0], dtype=torch.bool)[:, None].expand(8, 8).flatten()
    target = feature_target(make_geometry(outputs=OUTPUTS), [PictureArea.of(60, 120, 112)] * 2)
    assert torch.equal(target.weights[..., 0] > 0, known.expand(2, 2, 64))
    policy, batch = aligned(), batch_of()
    holes = torch.ones(2, 2, *GRID, dtype=torch.bool)
    holes[:, :, :, 0] = False
    holes[0, 1] = False
    masked = batch | {"observation.geometry.valid": holes}
    before = run(policy, masked)[1]["geom_align_loss"]
    other = batch[FEATURE].clone()
    other[~holes] = 100.0
    assert run(policy, masked | {FEATURE: other})[1]["geom_align_loss"] == before
    assert before != run(policy, batch)[1]["geom_align_loss"]
    without = {key: value for key, value in batch.items() if key != CAMERAS[0]}
    one = run(policy, without)[1]["geom_align_loss"]
    other = batch[FEATURE].clone()
    other[:, 0] = -other[:, 0]
    assert run(policy, without | {FEATURE: other})[1]["geom_align_loss"] == one


def test_gradients_of_both_losses_are_compared() -> None:
    policy = aligned()
    policy.measures_gradients = True
    _, numbers = run(policy, batch_of())
    assert numbers["geom_align_grad"] > 0
    assert 0 < numbers["geom_grad_angle"] < 180


@pytest.mark.parametrize("mode", ["prefix", "align"])
def test_features_that_the_policy_does_not_learn_from_change_nothing(mode: str) -> None:
    with_features = make_policy(geom_mode=mode, spec=SPEC).train()
    without = make_policy(geom_mode=mode).train()
    assert with_features.config.geom_spec == without.config.geom_spec
    assert torch.equal(run(with_features, batch_of())[0], run(without, make_batch())[0])


def test_both_has_tokens_of_the_geometry_alone() -> None:
    policy = aligned(geom_mode="both")
    assert policy.config.geom_spec["outputs"] == list(OUTPUTS)
    assert policy.model.geometry_adapter.outputs == DEFAULT_OUTPUTS
    assert policy.online.spec == make_spec()  # what is encoded at inference
    batch = batch_of()
    _, numbers = run(policy, batch)
    assert {"geom_alpha", "geom_align_cosine"} <= numbers.keys()
    without = {key: value for key, value in batch.items() if key != FEATURE}
    assert torch.equal(_chunk(policy.eval(), batch), _chunk(policy, without))
    with pytest.raises(GeometryError, match="feature"):
        run(policy.train(), without)


def test_options_that_cannot_be_used() -> None:
    with pytest.raises(UserInputError, match="geom_align_target: expected 'geometry' or 'feature', got 'features'"):
        make_config(geom_align_target="features")
    with pytest.raises(UserInputError, match="--outputs ray,ray_conf,feature"):
        make_config(geom_mode="align", geom_align_target="feature")
    assert make_config(geom_align_target="feature").parts == {"geometry_adapter"}  # prefix: nothing is aligned


def test_a_checkpoint_comes_back_and_is_bound_to_its_basis(tmp_path: Path) -> None:
    policy = aligned()
    policy.save_pretrained(tmp_path)
    loaded = PI05GeometryPolicy.from_pretrained(tmp_path).train()
    assert torch.equal(run(loaded, batch_of())[0], run(policy, batch_of())[0])
    assert json.loads((tmp_path / "config.json").read_text())["geom_spec"]["feature"]["dim"] == FEATURE_DIM
    other = make_config(geom_mode="align", geom_align_target="feature", spec=SPEC)
    assert other.geom_spec is not None
    other.geom_spec["feature"]["basis_sha256"] = "11" * 32
    with pytest.raises(CacheMismatchError, match=r"spec\.feature\.basis_sha256"):
        PI05GeometryPolicy.from_pretrained(tmp_path, config=other)


def test_projectors_come_and_go_with_the_target(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_policy(geom_mode="both").save_pretrained(tmp_path / "geometry")
    for before, after in (("geometry", "feature"), ("feature", "geometry")):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="geomcache"):
            config = make_config(geom_mode="both", geom_align_target=after, spec=SPEC)
            policy = PI05GeometryPolicy.from_pretrained(tmp_path / before, config=config)
        assert f"has no {after} projector: the projector starts fresh" in caplog.text
        assert f"has a {before} projector: it is left out" in caplog.text
        assert "adapter" not in caplog.text
        (tmp_path / after).mkdir(exist_ok=True)
        policy.save_pretrained(tmp_path / after)


def test_export_leaves_the_projector_out(tmp_path: Path) -> None:
    aligned().save_pretrained(tmp_path / "aligned")
    for name in ("preprocessor", "postprocessor"):
        (tmp_path / "aligned" / f"policy_{name}.json").write_text('{"steps": []}')
    said = export_plain(str(tmp_path / "aligned"), tmp_path / "plain")
    assert f"{PROJECTOR}norm.bias" in said[-1]
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["type"] == "pi05"
    assert not [name for name in config if name.startswith("geom_")]
