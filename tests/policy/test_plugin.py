"""The plugin as LeRobot sees it: discovery, configuration, processors, and checkpoints that load or say why not."""

import dataclasses
import inspect
import json
import logging
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import draccus
import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.policies.factory import get_policy_class, make_policy, make_pre_post_processors
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import PaliGemmaWithExpertModel, PI05Policy, PI05Pytorch, get_gemma_config
from lerobot.policies.pi05.processor_pi05 import make_pi05_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import tokenizer_processor
from safetensors.torch import load_file, save_file

from geomcache.da3.engine import EngineName
from geomcache.errors import CacheFormatError, CacheMismatchError, ModelError, ModelNotFoundError, UserInputError
from geomcache.policy.checkpoint import check_options
from geomcache.policy.configuration_pi05_geometry import PI05GeometryConfig
from geomcache.policy.modeling_pi05_geometry import PI05GeometryPolicy
from geomcache.policy.options import ENGINES
from geomcache.policy.processor_pi05_geometry import (
    PALIGEMMA_TOKENIZER,
    make_bytes_tokenizer,
    make_pi05_geometry_pre_post_processors,
)
from tests.support.policy import (
    ACTION_DIM,
    CAMERAS,
    CHUNK,
    QUICK,
    SIZE,
    features,
    loss_and_chunk,
    make_batch,
    make_config,
    make_geometry,
    make_plain_policy,
    make_spec,
    make_statistics,
)
from tests.support.policy import make_policy as make_small_policy

STATISTICS = {
    "observation.state": {"q01": np.zeros(2, np.float32), "q99": np.ones(2, np.float32)},
    "action": {"q01": -np.ones(ACTION_DIM, np.float32), "q99": np.ones(ACTION_DIM, np.float32)},
}

# Discovery


def test_lerobots_discovery_registers_it_and_imports_nothing_heavy() -> None:
    code = """
import sys
from lerobot.configs import PreTrainedConfig
from lerobot.configs.parser import load_plugin
load_plugin("geomcache.policy")
from lerobot.policies.factory import get_policy_class
print(get_policy_class("pi05_geometry").__module__, PreTrainedConfig.get_choice_class("pi05_geometry").__name__)
heavy = ("zarr", "tensorstore", "depth_anything_3", "geomcache.cache.store", "geomcache.da3.encoder")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [
        "geomcache.policy.modeling_pi05_geometry PI05GeometryConfig",
        "[]",
    ]


def test_lerobot_finds_policy_and_processors_by_name() -> None:
    assert get_policy_class("pi05_geometry") is PI05GeometryPolicy
    preprocessor, postprocessor = make_pre_post_processors(make_config(), dataset_stats=STATISTICS)
    assert [type(step).__name__ for step in preprocessor.steps][5] == "BytesTokenizerProcessorStep"
    assert len(postprocessor.steps) == 3


def dataset_metadata() -> SimpleNamespace:
    """What `make_policy` reads of a dataset."""
    described: dict[str, Any] = {
        key: {"dtype": "image", "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channels"]} for key in CAMERAS
    }
    described["observation.state"] = {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}
    described["action"] = {"dtype": "float32", "shape": (ACTION_DIM,), "names": ["x", "y", "z"]}
    return SimpleNamespace(features=described, stats=STATISTICS)


def test_lerobots_factory_makes_it_from_a_dataset() -> None:
    policy = make_policy(make_config(input_features={}, output_features={}), ds_meta=dataset_metadata())
    assert isinstance(policy, PI05GeometryPolicy)
    assert set(policy.config.image_features) == set(CAMERAS)
    assert loss_and_chunk(policy, make_batch())[1].shape == (2, CHUNK, ACTION_DIM)


# Configuration


def test_defaults_are_the_designs() -> None:
    config = PI05GeometryConfig(device="cpu")
    assert config.type == "pi05_geometry"
    assert config.use_geom_prefix is True
    assert config.geom_model_id is None
    assert config.geom_engine == "eager"
    assert config.geom_target_hw == (14, 14)
    assert config.geom_init_alpha == 0.1
    assert config.freeze_geom_model is True
    assert config.geom_attention == "full"
    assert config.geom_lr_scale == 10
    assert config.geom_modality_embedding is False
    plain = dataclasses.asdict(PI05Config(device="cpu"))
    assert {name: getattr(config, name) for name in plain} == plain


def test_the_engines_are_those_of_the_encoder() -> None:
    assert typing.get_args(EngineName) == ENGINES


def test_json_round_trip(tmp_path: Path) -> None:
    config = make_config(geom_attention="isolated", rtc_config=None)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["type"] == "pi05_geometry"
    again = PreTrainedConfig.from_pretrained(tmp_path)
    assert again == config
    assert again.geometry_spec == make_spec()
    assert again.geometry_statistics == make_statistics(make_spec())  # floats survive exactly


def test_command_line_overrides_a_checkpoints_configuration(tmp_path: Path) -> None:
    make_config().save_pretrained(tmp_path)
    overrides = ["--geom_target_hw=[3,4]", "--use_geom_prefix=false", "--geom_attention=isolated", "--geom_lr_scale=2"]
    config = PreTrainedConfig.from_pretrained(tmp_path, cli_overrides=overrides)
    assert (config.geom_target_hw, config.use_geom_prefix) == ((3, 4), False)
    assert (config.geom_attention, config.geom_lr_scale) == ("isolated", 2)


def test_training_configuration_round_trip(tmp_path: Path) -> None:
    args = ["--dataset.repo_id=a/b", "--policy.type=pi05_geometry", "--policy.device=cpu", "--policy.model_size=small"]
    args += ["--policy.geom_target_hw=[2,3]", "--policy.geom_modality_embedding=true", "--policy.push_to_hub=false"]
    config = draccus.parse(TrainPipelineConfig, args=args)
    assert config.policy.geom_target_hw == (2, 3)
    assert config.policy.geom_modality_embedding is True
    config.policy.bind_cache(make_spec(), make_statistics(make_spec()), "f" * 64)
    config.save_pretrained(tmp_path)
    assert TrainPipelineConfig.from_pretrained(tmp_path).policy == config.policy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_geom_model": False}, "freeze_geom_model: expected true, got false"),
        ({"geom_engine": "fast"}, "geom_engine: expected 'eager' or 'compiled', got 'fast'"),
        ({"geom_attention": "causal"}, "geom_attention: expected 'full' or 'isolated', got 'causal'"),
        ({"geom_target_hw": (9, 4)}, "at most 4 cells a side more than the cached grid 4x4, got 9x4"),
        ({"geom_target_hw": (4, 9)}, "at most 4 cells a side more than the cached grid 4x4, got 4x9"),
        ({"geom_target_hw": (0, 4)}, "geom_target_hw: expected 1 to 9999"),
        ({"geom_init_alpha": float("nan")}, "geom_init_alpha: expected a finite number"),
        ({"geom_lr_scale": 0.0}, "geom_lr_scale: expected a positive number, got 0.0"),
        ({"model_size": "tiny"}, "model_size: expected 'full' or 'small', got 'tiny'"),
        ({"image_resolution": (100, 100)}, "image_resolution: expected multiples of 14"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    """When a cache is bound, and, for an option given with a checkpoint, when the policy is built."""
    with pytest.raises(UserInputError, match=message):
        make_config(**options)
    config = make_config()
    for name, value in options.items():
        setattr(config, name, value)
    with pytest.raises(UserInputError, match=message):
        PI05GeometryPolicy(config)


def test_a_target_grid_of_four_more_cells_is_accepted() -> None:
    spec = make_config(geom_target_hw=(8, 8)).geometry_spec
    assert spec is not None
    assert spec.grid_hw == (4, 4)


# Binding a cache


def test_bind_cache_takes_over_what_the_cache_says() -> None:
    assert make_config(bound=False).geometry_spec is None
    config = make_config(bound=False)
    spec = make_spec(("ray", "ray_conf", "depth"))
    statistics = make_statistics(spec)
    config.bind_cache(spec, dict(reversed(statistics.items())), "0" * 64)
    assert config.geometry_spec == spec
    assert list(config.geometry_statistics.items()) == list(statistics.items())  # in the spec's order
    assert config.geom_fingerprint == "0" * 64
    assert json.loads(json.dumps(config.geom_spec)) == config.geom_spec


def test_a_checkpoint_keeps_its_statistics() -> None:
    config = make_config()
    before = config.geometry_statistics
    spec = dataclasses.replace(make_spec(), model_id="the same under another name")
    other = {name: moments.merge(moments) for name, moments in make_statistics(spec).items()}
    config.bind_cache(spec, other, "1" * 64)
    assert config.geometry_statistics == before != other
    assert config.geometry_spec == make_spec()
    assert config.geom_fingerprint == "1" * 64


@pytest.mark.parametrize(
    ("field", "change", "cached", "wanted"),
    [
        ("spec.process_res", {"process_res": 112}, 112, 56),
        ("spec.weights_sha256", {"weights_sha256": "11" * 32}, "11" * 32, "00" * 32),
        ("spec.views", {"views": "independent"}, "independent", "joint"),
        ("spec.outputs", {"outputs": ("ray",)}, ["ray"], ["ray", "ray_conf"]),
    ],
)
def test_another_cache_than_the_checkpoints(field: str, change: dict[str, Any], cached: Any, wanted: Any) -> None:
    spec = dataclasses.replace(make_spec(), **change)
    with pytest.raises(CacheMismatchError) as error:
        make_config().bind_cache(spec, make_statistics(spec), "1" * 64)
    assert (error.value.field, error.value.cached, error.value.wanted) == (field, cached, wanted)
    assert field in str(error.value)
    assert repr(cached) in str(error.value)
    assert repr(wanted) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_policy_needs_a_spec() -> None:
    with pytest.raises(UserInputError, match="geom_spec"):
        PI05GeometryPolicy(make_config(bound=False))
    PI05GeometryPolicy(make_config(bound=False, use_geom_prefix=False))


def test_a_damaged_configuration_says_so() -> None:
    config = make_config()
    config.geom_statistics = {"ray": (config.geom_statistics or {})["ray"]}
    with pytest.raises(CacheFormatError, match="ray_conf"):
        PI05GeometryPolicy(config)
    config = make_config()
    config.geom_spec = (config.geom_spec or {}) | {"grid_hw": "4x4"}
    with pytest.raises(CacheFormatError, match=r"spec\.grid_hw"):
        PI05GeometryPolicy(config)


# Weights


def test_random_weights_of_the_full_model_must_be_asked_for() -> None:
    config = make_config(model_size="full", image_resolution=(224, 224))
    with pytest.raises(UserInputError, match=r"--policy\.pretrained_path"):
        make_policy(config, ds_meta=dataset_metadata())


def saved(policy: Any, folder: Path) -> Path:
    policy.save_pretrained(folder)
    return folder


def edit_weights(folder: Path, edit: Any) -> Path:
    file = folder / "model.safetensors"
    state = load_file(file)
    edit(state)
    save_file(state, file)
    return folder


def test_a_checkpoint_of_ours_comes_back_to_the_bit(tmp_path: Path) -> None:
    policy = make_small_policy(geom_modality_embedding=True)
    policy.train()
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-2)
    policy.forward(make_batch())[0].backward()
    optimizer.step()  # every weight is another one than at the start, also the tied ones
    policy.eval()
    saved(policy, tmp_path)
    for loaded in (
        PI05GeometryPolicy.from_pretrained(tmp_path),
        make_policy(make_config(pretrained_path=tmp_path, geom_modality_embedding=True), ds_meta=dataset_metadata()),
    ):
        assert not loaded.training
        for name, value in policy.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        for ours, theirs in zip(
            loss_and_chunk(loaded, make_batch()), loss_and_chunk(policy, make_batch()), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_a_plain_checkpoint_gets_a_fresh_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = make_plain_policy(monkeypatch, seed=3)
    saved(plain, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["type"] == "pi05"
    with caplog.at_level(logging.INFO, logger="geomcache"):
        policy = make_policy(make_config(pretrained_path=tmp_path), ds_meta=dataset_metadata())
    assert "has no geometry adapter: the adapter starts fresh" in caplog.text
    own = policy.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(own[name], value), name
    assert policy.model.geometry_adapter.alpha.item() == pytest.approx(0.1)
    switched_off = make_config(pretrained_path=tmp_path, use_geom_prefix=False)
    off = PI05GeometryPolicy.from_pretrained(tmp_path, config=switched_off)
    assert torch.equal(loss_and_chunk(off, make_batch())[1], loss_and_chunk(plain, make_batch())[1])


def test_openpis_key_names_are_fixed_by_lerobots_own_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in lerobot/pi05_base: no prefix, and the word embedding only under its tied name."""
    plain = make_plain_policy(monkeypatch)
    saved(plain, tmp_path)
    embedding = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    head = "model.paligemma_with_expert.paligemma.lm_head.weight"

    def rename(state: dict[str, torch.Tensor]) -> None:
        state[head] = state.pop(embedding)
        for name in list(state):
            state[name.removeprefix("model.")] = state.pop(name)

    edit_weights(tmp_path, rename)
    policy = PI05GeometryPolicy.from_pretrained(tmp_path, config=make_config())
    assert torch.equal(policy.state_dict()[embedding], plain.state_dict()[embedding])


def test_an_adapter_can_be_switched_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = make_small_policy()
    saved(policy, tmp_path)
    config = PreTrainedConfig.from_pretrained(tmp_path, cli_overrides=["--use_geom_prefix=false"])
    with caplog.at_level(logging.WARNING, logger="geomcache"):
        off = PI05GeometryPolicy.from_pretrained(tmp_path, config=config)
    assert "has a geometry adapter: it is left out" in caplog.text
    assert not [name for name in off.state_dict() if "geometry_adapter" in name]
    # And what was trained without an adapter can be trained with one: nothing of the old one's geometry is left.
    saved(off, tmp_path / "off")
    left = json.loads((tmp_path / "off" / "config.json").read_text())
    assert (left["geom_spec"], left["geom_statistics"], left["geom_fingerprint"]) == (None, None, None)
    on = PI05GeometryPolicy.from_pretrained(tmp_path / "off", config=make_config())
    assert torch.equal(on.state_dict()["model.action_in_proj.weight"], off.state_dict()["model.action_in_proj.weight"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop("model.action_in_proj.weight"), r"lacks model\.action_in_proj\.weight"),
        (lambda state: state.pop("model.geometry_adapter.alpha"), r"lacks model\.geometry_adapter\.alpha"),
        (lambda state: state.pop("model.geometry_adapter.std"), r"lacks model\.geometry_adapter\.std"),
        (lambda state: state.update(extra=torch.zeros(1)), r"has unknown model\.extra"),
        (
            lambda state: state.update({"model.action_in_proj.bias": torch.zeros(9)}),
            r"does not fit: model\.action_in_proj\.bias is \[9\], expected \[128\]",
        ),
        (
            lambda state: [state.pop(name) for name in list(state) if ".vision_tower." in name],
            r"lacks model\.paligemma_with_expert\S+, .* and \d+ more: load it with the options",
        ),
    ],
    ids=["missing", "adapter", "buffer", "unknown", "shape", "many"],
)
def test_weights_that_do_not_fit_are_an_error(tmp_path: Path, edit: Any, message: str) -> None:
    saved(make_small_policy(), tmp_path)
    edit_weights(tmp_path, edit)
    with pytest.raises(ModelError, match=message) as error:
        make_policy(make_config(pretrained_path=tmp_path), ds_meta=dataset_metadata())
    assert "\n" not in str(error.value)


def test_a_plain_checkpoint_that_lacks_something_else_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(make_plain_policy(monkeypatch), tmp_path)
    edit_weights(tmp_path, lambda state: state.pop("model.time_mlp_in.bias"))
    with pytest.raises(ModelError, match=r"model\.time_mlp_in\.bias"):
        PI05GeometryPolicy.from_pretrained(tmp_path, config=make_config())


@pytest.mark.parametrize("option", [{"max_action_dim": 7}, {"image_resolution": (56, 56)}])
def test_other_sizes_than_the_checkpoints_are_an_error(tmp_path: Path, option: dict[str, Any]) -> None:
    saved(make_small_policy(), tmp_path)
    with pytest.raises(ModelError, match="does not fit: model"):
        PI05GeometryPolicy.from_pretrained(tmp_path, config=make_config(**option))


def test_a_checkpoint_of_another_policy_is_an_error(tmp_path: Path) -> None:
    saved(make_small_policy(), tmp_path)
    for kind in ("act", None):
        config = json.loads((tmp_path / "config.json").read_text()) | {"type": kind}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=f"pi05 or pi05_geometry.* {kind!r}"):
            PI05GeometryPolicy.from_pretrained(tmp_path, config=make_config())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"expected JSON in config\.json"):
        PI05GeometryPolicy.from_pretrained(tmp_path, config=make_config())


def test_a_plain_checkpoint_needs_a_configuration_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(make_plain_policy(monkeypatch), tmp_path)
    with pytest.raises(ModelError, match=r"pi05_geometry .*pi05\b"):
        PI05GeometryPolicy.from_pretrained(tmp_path)


def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = make_config()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        PI05GeometryPolicy.from_pretrained(tmp_path / "nowhere", config=config)
    with pytest.raises(ModelNotFoundError, match="nobody/nothing"):
        PI05GeometryPolicy.from_pretrained("nobody/nothing", config=config, local_files_only=True)
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        PI05GeometryPolicy.from_pretrained(tmp_path, config=config)
    saved(make_small_policy(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    with pytest.raises(ModelNotFoundError, match=r"model\.safetensors .*config\.json"):
        make_policy(make_config(pretrained_path=tmp_path), ds_meta=dataset_metadata())
    (tmp_path / "model.safetensors").write_bytes(b"12345678 no weights")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        PI05GeometryPolicy.from_pretrained(tmp_path, config=config)


def test_a_geometry_checkpoint_brings_its_statistics_and_refuses_other_geometry(tmp_path: Path) -> None:
    saved(make_small_policy(), tmp_path)
    config = make_config(bound=False)
    spec = make_spec()
    config.bind_cache(spec, {n: m.merge(m.merge(m)) for n, m in make_statistics(spec).items()}, "2" * 64)
    policy = PI05GeometryPolicy.from_pretrained(tmp_path, config=config)
    assert policy.config.geometry_statistics == make_statistics(spec)
    other = dataclasses.replace(spec, process_res=112)
    with pytest.raises(CacheMismatchError, match=r"spec\.process_res: .*56.*112"):
        PI05GeometryPolicy.from_pretrained(tmp_path, config=make_config(spec=other))


def test_a_checkpoint_without_adapter_brings_no_statistics(tmp_path: Path) -> None:
    """Checkpoints of older versions kept the spec and statistics of an adapter that was switched off."""
    saved(make_small_policy(use_geom_prefix=False), tmp_path)
    stale = json.loads((tmp_path / "config.json").read_text())
    spec = make_spec()
    stale["geom_spec"] = dataclasses.replace(spec, process_res=112).to_dict()
    stale["geom_statistics"] = {"ray": "of another cache"}
    (tmp_path / "config.json").write_text(json.dumps(stale))
    policy = PI05GeometryPolicy.from_pretrained(tmp_path, config=make_config())
    assert policy.config.geometry_spec == spec
    assert policy.config.geometry_statistics == make_statistics(spec)


def test_cameras_that_differ_by_name_alone_are_renamed() -> None:
    spec = make_spec()
    names = {camera.key: f"observation.images.new{n}" for n, camera in enumerate(spec.cameras)}
    renamed = dataclasses.replace(
        spec, cameras=tuple(dataclasses.replace(camera, key=names[camera.key]) for camera in spec.cameras)
    )
    back = json.dumps({new: old for old, new in names.items()})
    with pytest.raises(CacheMismatchError) as caught:
        make_config().bind_cache(renamed, make_statistics(spec), "2" * 64)
    assert caught.value.field == "spec.cameras"
    assert f"--policy.path=CHECKPOINT --rename_map='{back}'" in str(caught.value)
    larger = dataclasses.replace(
        renamed, cameras=tuple(dataclasses.replace(camera, height=99) for camera in renamed.cameras)
    )
    with pytest.raises(CacheMismatchError) as caught:
        make_config().bind_cache(larger, make_statistics(spec), "2" * 64)
    assert "--rename_map" not in str(caught.value)


def test_options_of_a_checkpoint_whose_weights_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    trained = draccus.encode(make_config(geom_attention="isolated", num_inference_steps=7)) | {"type": "pi05_geometry"}
    with caplog.at_level(logging.WARNING, logger="geomcache"):
        check_options(make_config(geom_attention="isolated", num_inference_steps=7, device="cpu"), trained, "p", never)
        assert caplog.text == ""
        with pytest.raises(UserInputError, match=r'policy\.geom_attention: .*"isolated".*--policy\.path=p'):
            check_options(make_config(num_inference_steps=7), trained, "p", never)
        assert caplog.text == ""
        # An option that is given is meant; every difference is listed. Names of a run are no options.
        check_options(make_config(tags=["a"]), trained, "p", lambda name: name == "policy.geom_attention")
        check_options(make_config(), trained | {"type": "pi05"}, "p", never)  # no adapter that was trained with them
    for record in caplog.records:
        message = record.getMessage()
        assert 'geom_attention="full" (checkpoint: "isolated")' in message
        assert "num_inference_steps=2 (checkpoint: 7)" in message
        assert "tags" not in message
    assert len(caplog.records) == 2


def never(_name: str) -> bool:
    return False


def test_a_lora_folder_is_named_as_one(tmp_path: Path) -> None:
    saved(make_small_policy(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "me/base"}))
    with pytest.raises(ModelError, match="LoRA .*me/base") as caught:
        PI05GeometryPolicy.from_pretrained(tmp_path)
    assert f"--policy.path={tmp_path}" in str(caught.value)
    for damaged in ("[]", "{"):
        (tmp_path / "adapter_config.json").write_text(damaged)
        with pytest.raises(ModelError, match=r"LoRA .*adapter_config\.json"):
            PI05GeometryPolicy.from_pretrained(tmp_path)


# Processors


@pytest.fixture
def local_tokenizer(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In the place of the Hub's: the names that were asked for."""
    asked: list[str] = []

    def load(name: str) -> Any:
        asked.append(name)
        return make_bytes_tokenizer()

    monkeypatch.setattr(tokenizer_processor.AutoTokenizer, "from_pretrained", load)
    return asked


def test_processors_are_lerobots_for_pi05(local_tokenizer: list[str]) -> None:
    options = {**QUICK, **features(), "image_resolution": (224, 224)}
    ours = make_pi05_geometry_pre_post_processors(PI05GeometryConfig(**options), STATISTICS)
    theirs = make_pi05_pre_post_processors(PI05Config(**options), STATISTICS)
    for mine, upstream in zip(ours, theirs, strict=True):
        assert mine.name == upstream.name
        assert [type(step) for step in mine.steps] == [type(step) for step in upstream.steps]
        for step, reference in zip(mine.steps, upstream.steps, strict=True):
            assert step.get_config() == reference.get_config()
            assert step.state_dict().keys() == reference.state_dict().keys()
        assert mine.to_transition is upstream.to_transition
        assert mine.to_output is upstream.to_output
    assert local_tokenizer == [PALIGEMMA_TOKENIZER] * 2


def raw_batch() -> dict[str, Any]:
    """A batch as a data loader gives it to LeRobot's trainer."""
    made = {key: torch.rand(2, 3, SIZE, SIZE) for key in CAMERAS}
    made |= {"observation.state": torch.rand(2, 2), "action": torch.rand(2, CHUNK, ACTION_DIM)}
    return made | make_geometry().to_batch() | {"task": ["pick up the pen", "put it down"], "index": torch.arange(2)}


def test_geometry_passes_untouched() -> None:
    preprocessor, _ = make_pre_post_processors(make_config(tokenizer_max_length=48), dataset_stats=STATISTICS)
    raw = raw_batch()
    batch = preprocessor(dict(raw))
    for key in ("observation.geometry.ray", "observation.geometry.ray_conf", *CAMERAS):
        assert batch[key].dtype == raw[key].dtype
        assert torch.equal(batch[key], raw[key])
    torch.testing.assert_close(batch["observation.state"], raw["observation.state"] * 2 - 1)
    text = str(make_bytes_tokenizer().decode(batch["observation.language.tokens"][0], skip_special_tokens=True))
    assert text.startswith("Task: pick up the pen, State: ")
    policy = make_small_policy(tokenizer_max_length=48)
    assert torch.isfinite(policy.forward(batch)[0])


def test_a_plain_checkpoints_processors_carry_geometry(tmp_path: Path, local_tokenizer: list[str]) -> None:
    plain = PI05Config(**QUICK, **features())
    for pipeline in make_pi05_pre_post_processors(plain, STATISTICS):
        pipeline.save_pretrained(tmp_path)
    # As LeRobot's trainer loads them.
    config = make_config(pretrained_path=tmp_path)
    preprocessor, postprocessor = make_pre_post_processors(
        config,
        pretrained_path=tmp_path,
        preprocessor_overrides={
            "device_processor": {"device": "cpu"},
            "normalizer_processor": {
                "features": {**config.input_features, **config.output_features},
                "norm_map": config.normalization_mapping,
                "stats": STATISTICS,
            },
            "rename_observations_processor": {"rename_map": {}},
        },
        postprocessor_overrides={
            "unnormalizer_processor": {
                "features": config.output_features,
                "norm_map": config.normalization_mapping,
                "stats": STATISTICS,
            }
        },
    )
    raw = raw_batch()
    batch = preprocessor(dict(raw))
    assert torch.equal(batch["observation.geometry.ray"], raw["observation.geometry.ray"])
    policy = make_small_policy()
    assert torch.isfinite(policy.forward(batch)[0])
    assert postprocessor(policy.predict_action_chunk(batch)).shape == (2, CHUNK, ACTION_DIM)


def test_bytes_tokenizer_by_hand() -> None:
    tokenizer = make_bytes_tokenizer()
    assert len(tokenizer) == 257
    encoded = tokenizer(["ab ba\n", "é"], padding="max_length", max_length=8, truncation=True)
    first = encoded["input_ids"][0]
    assert first[0] == first[4] != first[1] == first[3]
    assert encoded["attention_mask"] == [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert encoded["input_ids"][1][2:] == [0] * 6  # padding
    assert 0 not in first[:6]
    for text in ("Task: a, State: 1 2;\nAction: ", "é ≠ 漢字", "  two  spaces "):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
    every = {token for byte in range(256) for token in tokenizer(bytes([byte]).decode("latin-1"))["input_ids"]}
    assert max(every) <= 256


def test_saved_processors_name_no_folder_and_load_again(tmp_path: Path) -> None:
    config = make_config(tokenizer_max_length=48)
    preprocessor, postprocessor = make_pre_post_processors(config, dataset_stats=STATISTICS)
    preprocessor.save_pretrained(tmp_path)
    postprocessor.save_pretrained(tmp_path)
    steps = json.loads((tmp_path / "policy_preprocessor.json").read_text())["steps"]
    (step,) = [step for step in steps if step.get("registry_name") == "geomcache_bytes_tokenizer"]
    assert "tokenizer_name" not in step["config"]
    again, _ = make_pre_post_processors(config, pretrained_path=tmp_path)
    raw = raw_batch()
    before, after = preprocessor(dict(raw)), again(dict(raw))
    assert torch.equal(before["observation.language.tokens"], after["observation.language.tokens"])


def test_another_tokenizer_by_folder(tmp_path: Path) -> None:
    make_bytes_tokenizer().save_pretrained(tmp_path)
    preprocessor, _ = make_pre_post_processors(make_config(tokenizer_name=str(tmp_path)), dataset_stats=STATISTICS)
    assert preprocessor.steps[5].tokenizer_name == str(tmp_path)
    assert len(preprocessor.steps[5].input_tokenizer) == 257


def test_a_tokenizer_too_large_for_the_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_processor.AutoTokenizer, "from_pretrained", lambda name: [0] * 257152)
    with pytest.raises(UserInputError, match="512 .*model_size=small, big .*257152"):
        make_pi05_geometry_pre_post_processors(make_config(tokenizer_name="big"), STATISTICS)


# The seams into LeRobot: signatures that ours override or call


def names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_signatures_that_we_override_or_call() -> None:
    assert names(PI05Pytorch.__init__) == ["self", "config", "rtc_processor"]
    # What later versions add is passed on: tests/policy/test_upstream.py.
    prefix = ["self", "images", "img_masks", "tokens", "masks"]
    assert names(PI05Pytorch.embed_prefix)[:5] == prefix
    assert names(PI05Pytorch.forward)[:8] == [*prefix, "actions", "noise", "time"]
    assert names(PI05Pytorch.sample_actions)[:5] == prefix
    assert {"noise", "num_steps", "kwargs"} <= set(names(PI05Pytorch.sample_actions))
    assert names(PI05Policy.__init__) == ["self", "config", "kwargs"]
    assert names(PI05Policy.forward) == ["self", "batch", "reduction"]
    assert names(PI05Policy.predict_action_chunk) == ["self", "batch", "kwargs"]
    assert names(PI05Policy.get_optim_params) == ["self"]
    assert names(PI05Policy._fix_pytorch_state_dict_keys) == ["self", "state_dict", "model_config"]
    assert names(PI05Policy._get_default_peft_targets) == ["self"]
    assert names(PreTrainedPolicy._validate_peft_config) == ["self", "peft_config"]
    assert names(PI05Config.validate_features) == ["self"]
    assert names(PI05Policy.from_pretrained) == [
        *("pretrained_name_or_path", "config", "force_download", "resume_download", "proxies", "token", "cache_dir"),
        *("local_files_only", "revision", "strict", "kwargs"),
    ]
    theirs = ["self", "vlm_config", "action_expert_config", "use_adarms", "precision", "image_size"]
    assert names(PaliGemmaWithExpertModel.__init__) == [*theirs, "freeze_vision_encoder", "train_expert_only"]
    assert get_gemma_config("gemma_2b").width == 2048
