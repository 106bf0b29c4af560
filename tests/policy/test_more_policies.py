"""`pi0_geometry` and `smolvla_geometry`: the same contract as `pi05_geometry`, against LeRobot's own classes."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.common.vla_utils import make_att_2d_masks
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.pi0 import processor_pi0
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from safetensors.torch import load_file, save_file

from geomcache.errors import ModelError, UserInputError
from geomcache.evaluation.latency import ChunkTimer
from geomcache.geometry import Geometry
from geomcache.policy import PI0GeometryConfig, SmolVLAGeometryConfig
from geomcache.policy.export import export_plain
from geomcache.policy.pi0.modeling_pi0_geometry import PI0GeometryPolicy
from geomcache.policy.pi0.processor_pi0_geometry import make_pi0_geometry_pre_post_processors
from geomcache.policy.prefix import PrefixInputs
from geomcache.policy.processor_pi05_geometry import make_bytes_tokenizer
from geomcache.policy.smolvla.modeling_smolvla_geometry import SmolVLAGeometryPolicy
from tests.support import smolvla
from tests.support.policy import (
    ACTION_DIM,
    CAMERAS,
    CHUNK,
    IMAGE_TOKENS,
    TEXT,
    loss_and_chunk,
    make_batch,
    make_config,
    make_geometry,
    make_plain_policy,
    make_policy,
    save,
)

GEOMETRY = 2 * 2 * 2  # views, target grid
STATISTICS = {
    "observation.state": {"mean": torch.zeros(2), "std": torch.ones(2)},
    "action": {"mean": torch.zeros(ACTION_DIM), "std": torch.ones(ACTION_DIM)},
}
KINDS = ("pi0", "smolvla")
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smolvla.make_language_model(tmp_path_factory.mktemp("smolvlm"))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(kind: str, language_model: Path) -> Make:
    """Make a policy with geometry."""
    if kind == "pi0":
        return lambda **options: make_policy(kind="pi0", **options)
    return lambda **options: smolvla.make_smolvla(language_model, **options)


@pytest.fixture
def config_of(kind: str, language_model: Path) -> Make:
    if kind == "pi0":
        return lambda **options: make_config(kind="pi0", **options)
    return lambda **options: smolvla.make_smolvla_config(language_model, **options)


@pytest.fixture
def plain(kind: str, language_model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """LeRobot's own policy, with the weights that `make` draws."""
    return make_plain_policy(monkeypatch, kind="pi0") if kind == "pi0" else smolvla.make_plain_smolvla(language_model)


# Off means LeRobot's


def test_without_geometry_it_is_lerobots_to_the_bit(make: Make, plain: Any) -> None:
    policy = make(use_geom_prefix=False)
    assert policy.online is None
    assert policy.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(policy.state_dict()[name], value), name
    for batch in (make_batch(), make_batch(geometry=False)):
        for ours, theirs in zip(loss_and_chunk(policy, batch), loss_and_chunk(plain, batch), strict=True):
            assert torch.equal(ours, theirs)


def test_without_geometry_it_trains_as_lerobots_to_the_bit(make: Make, plain: Any) -> None:
    trained = []
    for policy in (plain, make(use_geom_prefix=False)):
        policy.train()
        optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
        for step in range(2):
            torch.manual_seed(step)
            policy.forward(make_batch(seed=step))[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(policy.state_dict())
    for name, value in trained[0].items():
        assert torch.equal(trained[1][name], value), name


def test_a_policy_has_all_that_lerobots_constructor_makes(make: Make, plain: Any) -> None:
    """Ours replaces LeRobot's constructor. What a later LeRobot adds to it would be missing here."""
    policy = make()
    assert vars(policy).keys() - vars(plain).keys() == {"allow_resize", "online", "_adapter_grad_norm", "_spec"}
    assert vars(plain).keys() <= vars(policy).keys()
    assert vars(plain.model).keys() <= vars(policy.model).keys()
    children = dict(policy.model.named_children()).keys()
    assert children - {"geometry_adapter"} == dict(plain.model.named_children()).keys()


# The prefix


def embedded(policy: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Embeddings, pad and attention masks of the prefix that a prediction makes."""
    seen: list[tuple[torch.Tensor, ...]] = []
    embed = policy.model.embed_prefix

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(embed(*args, **kwargs))
        return seen[-1]

    policy.model.embed_prefix = watched
    policy.predict_action_chunk(batch)
    del policy.model.embed_prefix
    assert len(seen) == 1
    return seen[0]


@pytest.mark.parametrize("attention", ["full", "isolated"])
def test_where_geometry_is_and_who_sees_it(kind: str, make: Make, plain: Any, attention: str) -> None:
    policy, batch = make(geom_attention=attention), make_batch()
    embs, pad_masks, att_masks = embedded(policy, batch)
    theirs = embedded(plain, batch)
    before = 2 * (IMAGE_TOKENS if kind == "pi0" else smolvla.IMAGE_TOKENS) + TEXT
    after = before + GEOMETRY
    state = 1 if kind == "smolvla" else 0  # the last token of SmolVLA's prefix
    assert embs.shape[1] == after + state
    assert torch.equal(embs[:, :before], theirs[0][:, :before])
    assert torch.equal(embs[:, after:], theirs[0][:, before:])
    tokens = policy.model.geometry_adapter(make_geometry())
    assert torch.equal(embs[:, before:after], tokens.embs)
    assert pad_masks[:, before:].all()
    assert torch.equal(pad_masks[:, :before], theirs[1][:, :before])
    sees = make_att_2d_masks(pad_masks, att_masks)[0]
    valid = pad_masks[0]
    images_and_text = torch.arange(before)[valid[:before]]
    assert sees[images_and_text][:, before:after].all() == (attention == "full")
    assert sees[images_and_text][:, before:after].any() == (attention == "full")
    assert sees[before:after][:, valid.nonzero()[: -state or None, 0]].all()
    if state:
        assert sees[-1][valid].all()
        assert not sees[:-1, -1].any()


def test_positions_of_images_and_text_stay(kind: str, make: Make, plain: Any) -> None:
    batch = make_batch()
    _, ours, _ = embedded(make(), batch)
    _, theirs, _ = embedded(plain, batch)
    before = theirs.shape[1] - (kind == "smolvla")
    assert torch.equal(ours.cumsum(1)[:, :before], theirs.cumsum(1)[:, :before])


def test_geometry_matters_and_the_adapter_learns(make: Make) -> None:
    policy, batch = make(geom_init_alpha=1.0), make_batch()
    other = batch | make_geometry(shift=0.5).to_batch()
    for one, another in zip(loss_and_chunk(policy, batch), loss_and_chunk(policy, other), strict=True):
        assert not torch.equal(one, another)
    policy.train()
    loss, numbers = policy.forward(batch)
    loss.backward()
    assert policy.model.geometry_adapter.projection.weight.grad.abs().sum() > 0
    assert {"geom_alpha", "geom_token_norm", "image_token_norm"} <= numbers.keys()
    embs, pad_masks, _ = embedded(policy, batch)
    images = embs.shape[1] - GEOMETRY - TEXT - (policy.name == "smolvla_geometry")
    lengths = embs[:, :images].detach().double().norm(dim=-1)[pad_masks[:, :images]]
    assert numbers["image_token_norm"] == pytest.approx(lengths.mean().item(), rel=1e-5)
    rates = [group.get("lr") for group in policy.get_optim_params()]
    assert rates == [None, pytest.approx(10 * policy.config.optimizer_lr)]


def test_the_encoder_runs_once_a_chunk(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make()
    encoded: list[Any] = []

    def encode(batch: dict[str, Any], *_: Any, **__: Any) -> Geometry:
        encoded.append(batch[CAMERAS[0]])
        return make_geometry()

    monkeypatch.setattr(policy, "online", encode)
    timer = ChunkTimer(policy)
    observation = make_batch(geometry=False)
    torch.manual_seed(7)
    actions = torch.stack([policy.select_action(dict(observation)) for _ in range(2 * CHUNK)], dim=1)
    assert len(encoded) == len(timer.times) == 2
    assert all(chunk.geometry > 0 and chunk.denoising_steps == 2 and chunk.prefix > 0 for chunk in timer.times)
    torch.manual_seed(7)
    expected = [policy.predict_action_chunk(make_batch()) for _ in range(2)]
    torch.testing.assert_close(actions, torch.cat(expected, dim=1), rtol=0, atol=0)


# Pi0's alignment, and what SmolVLA does not have


def test_pi0_can_be_aligned() -> None:
    policy = make_policy(kind="pi0", geom_mode="align").train()
    assert policy.online is None
    torch.manual_seed(5)
    loss, numbers = policy.forward(make_batch())
    loss.backward()
    assert policy.model.geometry_projector.output.weight.grad.abs().sum() > 0
    expected = numbers["geom_action_loss"] + 0.5 * numbers["geom_align_loss"]
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    off = make_policy(kind="pi0", use_geom_prefix=False).train()
    torch.manual_seed(5)
    assert off.forward(make_batch())[0].item() == pytest.approx(numbers["geom_action_loss"], rel=1e-6)


def test_an_aligned_pi0_is_exported_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(kind="pi0", geom_mode="align")
    save(policy, tmp_path / "ours")
    for processor in processor_pi0_without_tokenizer(policy.config):
        processor.save_pretrained(tmp_path / "ours")
    export_plain(str(tmp_path / "ours"), tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["type"] == "pi0"
    plain = make_plain_policy(monkeypatch, seed=9, kind="pi0")
    missing, unexpected = plain.load_state_dict(load_file(tmp_path / "plain" / "model.safetensors"), strict=False)
    assert not unexpected
    assert all(name.endswith("embed_tokens.weight") for name in missing)  # tied to the head, which is there
    for ours, theirs in zip(loss_and_chunk(policy, make_batch()), loss_and_chunk(plain, make_batch()), strict=True):
        assert torch.equal(ours, theirs)


def processor_pi0_without_tokenizer(config: Any) -> list[Any]:
    """LeRobot's processors of Pi0, without the tokenizer of the Hub."""
    pipelines = make_pi0_geometry_pre_post_processors(config, STATISTICS)
    pipelines[0].steps = [step for step in pipelines[0].steps if "Tokenizer" not in type(step).__name__]
    return list(pipelines)


def test_smolvla_has_no_alignment(language_model: Path) -> None:
    config = smolvla.make_smolvla_config(language_model)
    assert not hasattr(config, "geom_mode")
    assert not config.is_aligned


def test_smolvlas_padding_after_the_state_is_refused(language_model: Path) -> None:
    with pytest.raises(UserInputError, match=r"prefix_length: .* 40"):
        smolvla.make_smolvla(language_model, prefix_length=40)
    assert smolvla.make_smolvla(language_model, prefix_length=40, use_geom_prefix=False).config.prefix_length == 40


def test_states_of_several_steps_stay_behind_geometry(language_model: Path) -> None:
    policy = smolvla.make_smolvla(language_model)
    batch = make_batch()
    images, masks = policy.prepare_images(batch)
    text = (batch["observation.language.tokens"], batch["observation.language.attention_mask"])
    states = torch.rand(2, 3, policy.config.max_state_dim)
    tokens = policy.model.geometry_adapter(make_geometry())
    theirs = policy.model.embed_prefix(images, masks, *text, states)
    ours = policy.model.embed_prefix(PrefixInputs(images, tokens), masks, *text, states)
    assert torch.equal(ours[0][:, -3:], theirs[0][:, -3:])
    assert torch.equal(ours[0][:, -3 - GEOMETRY : -3], tokens.embs)


# Checkpoints and LeRobot's factory


def test_lerobot_finds_them_by_name(language_model: Path) -> None:
    assert get_policy_class("pi0_geometry") is PI0GeometryPolicy
    assert get_policy_class("smolvla_geometry") is SmolVLAGeometryPolicy
    for config in (make_config(kind="pi0"), smolvla.make_smolvla_config(language_model)):
        preprocessor, postprocessor = make_pre_post_processors(config, dataset_stats=STATISTICS)
        assert len(preprocessor.steps) > 4
        assert len(postprocessor.steps) > 1


def test_the_options_of_lerobot_keep_their_defaults(kind: str) -> None:
    ours = {"pi0": PI0GeometryConfig, "smolvla": SmolVLAGeometryConfig}[kind](device="cpu")
    theirs = PreTrainedConfig.get_choice_class(kind)(device="cpu")
    assert {name: getattr(ours, name) for name in vars(theirs)} == vars(theirs)


def test_pi0s_processors_are_lerobots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step; LeRobot's asks for a tokenizer of the Hub."""
    from lerobot.processor import tokenizer_processor

    class FromHub:
        @staticmethod
        def from_pretrained(name: str, **_: Any) -> Any:
            assert name == "google/paligemma-3b-pt-224"
            return make_bytes_tokenizer()

    monkeypatch.setattr(tokenizer_processor, "AutoTokenizer", FromHub)
    config = make_config(kind="pi0", tokenizer_name="google/paligemma-3b-pt-224")
    ours = make_pi0_geometry_pre_post_processors(config, STATISTICS)
    theirs = processor_pi0.make_pi0_pre_post_processors(config, STATISTICS)
    for mine, upstream in zip(ours, theirs, strict=True):
        assert [type(step) for step in mine.steps] == [type(step) for step in upstream.steps]
        assert [step.get_config() for step in mine.steps] == [step.get_config() for step in upstream.steps]


def test_smolvlas_processors_are_lerobots(language_model: Path) -> None:
    config = smolvla.make_smolvla_config(language_model)
    for mine, upstream in zip(
        make_pre_post_processors(config, dataset_stats=STATISTICS),
        make_smolvla_pre_post_processors(config, STATISTICS),
        strict=True,
    ):
        assert [step.get_config() for step in mine.steps] == [step.get_config() for step in upstream.steps]


def test_a_checkpoint_comes_back_to_the_bit(kind: str, make: Make, tmp_path: Path) -> None:
    policy = make(seed=3)
    save(policy, tmp_path)
    again = get_policy_class(f"{kind}_geometry").from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["type"] == f"{kind}_geometry"
    for ours, theirs in zip(loss_and_chunk(again, make_batch()), loss_and_chunk(policy, make_batch()), strict=True):
        assert torch.equal(ours, theirs)


def test_tied_weights_are_loaded(tmp_path: Path) -> None:
    """A file has them under one of their names."""
    tied = smolvla.make_language_model(tmp_path / "vlm", tied=True)
    policy = smolvla.make_smolvla(tied, seed=3)
    save(policy, tmp_path / "policy")
    again = SmolVLAGeometryPolicy.from_pretrained(tmp_path / "policy")
    for name, value in policy.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_plain_checkpoint_gains_geometry(
    kind: str, make: Make, config_of: Make, plain: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(plain, tmp_path)
    with caplog.at_level(logging.INFO, logger="geomcache"):
        policy = get_policy_class(f"{kind}_geometry").from_pretrained(tmp_path, config=config_of())
    assert any("geometry adapter" in record.getMessage() for record in caplog.records)
    own = policy.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(own[name], value), name
    assert {name for name in own if name not in plain.state_dict()} == {
        f"model.geometry_adapter.{name}" for name in policy.model.geometry_adapter.state_dict()
    }


def test_a_missing_weight_is_an_error(kind: str, make: Make, tmp_path: Path) -> None:
    save(make(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.action_in_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks model\.action_in_proj\.weight"):
        get_policy_class(f"{kind}_geometry").from_pretrained(tmp_path)


def test_checkpoints_of_another_policy_are_refused(kind: str, make: Make, config_of: Make, tmp_path: Path) -> None:
    save(make_policy(), tmp_path / "pi05")
    with pytest.raises(ModelError, match=rf"{kind} or {kind}_geometry.* 'pi05_geometry'"):
        get_policy_class(f"{kind}_geometry").from_pretrained(tmp_path / "pi05", config=config_of())
    save(make(), tmp_path / kind)
    with pytest.raises(ModelError, match=rf"pi05 or pi05_geometry.* '{kind}_geometry'"):
        get_policy_class("pi05_geometry").from_pretrained(tmp_path / kind, config=make_config())


def test_random_weights_must_be_asked_for(kind: str, config_of: Make) -> None:
    config = config_of(random_init=False, **({"model_size": "full"} if kind == "pi0" else {}))
    with pytest.raises(UserInputError, match=rf"{kind}_geometry: .*lerobot/{kind}_base.*random_init=true"):
        get_policy_class(f"{kind}_geometry")(config)
