"""`export-plain`: a folder of plain pi05, equal to the bit, that LeRobot's own classes load."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi05 import modeling_pi05
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.processor_pi05 import make_pi05_pre_post_processors
from lerobot.processor import tokenizer_processor
from safetensors.torch import load_file, save_file

from geomcache.errors import ModelError, UserInputError
from geomcache.policy.checkpoint import part_prefix
from geomcache.policy.export import export_plain, plain_config
from geomcache.policy.modeling_pi05_geometry import PI05GeometryPytorch, SmallPI05
from geomcache.policy.options import PARTS
from geomcache.policy.processor_pi05_geometry import make_bytes_tokenizer, make_pi05_geometry_pre_post_processors
from geomcache.policy.small_paligemma import SMALL_GEMMA
from tests.support.cli import call
from tests.support.policy import loss_and_chunk, make_batch, make_config, make_plain_policy, make_policy, make_spec

STATS = {
    "observation.state": {"q01": torch.tensor([-2.0, -1.0]), "q99": torch.tensor([2.0, 3.0])},
    "action": {"q01": torch.tensor([-1.0] * 3), "q99": torch.tensor([1.0, 2.0, 3.0])},
}


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of PaliGemma's on the Hub."""
    monkeypatch.setattr(tokenizer_processor.AutoTokenizer, "from_pretrained", lambda _name: make_bytes_tokenizer())


def checkpoint(folder: Path, **options: Any) -> Any:
    """Save a policy and its processors, as a run of LeRobot's trainer does."""
    policy = make_policy(**options)
    policy.save_pretrained(folder)
    for processor in make_pi05_pre_post_processors(policy.config, STATS):
        processor.save_pretrained(folder)
    return policy


def test_stock_lerobot_loads_it_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: None
) -> None:
    policy = checkpoint(tmp_path / "ours", geom_mode="align")
    assert call(monkeypatch, "export-plain", tmp_path / "ours", tmp_path / "plain") == 0
    said = capsys.readouterr()
    assert f"written: {tmp_path / 'plain'}" in said.out
    assert "model.geometry_projector.norm.bias" in said.out
    assert "model_size=small" in said.err
    config = PI05Config.from_pretrained(tmp_path / "plain")
    assert type(config) is PI05Config
    with monkeypatch.context() as patch:  # LeRobot's classes, in the small size
        patch.setattr(modeling_pi05, "get_gemma_config", lambda variant: SMALL_GEMMA)
        patch.setattr(modeling_pi05, "PaliGemmaWithExpertModel", lambda *_, **__: SmallPI05(config))
        stock = modeling_pi05.PI05Policy.from_pretrained(tmp_path / "plain")
    assert "All keys loaded successfully!" in capsys.readouterr().out
    for name, value in stock.state_dict().items():
        assert torch.equal(policy.state_dict()[name], value), name
    for theirs, ours in zip(loss_and_chunk(stock, make_batch()), loss_and_chunk(policy, make_batch()), strict=True):
        assert torch.equal(theirs, ours)
    # The same file as LeRobot's own policy writes.
    make_plain_policy(monkeypatch).save_pretrained(tmp_path / "lerobots")
    names = {folder: set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("plain", "lerobots")}
    assert names["plain"] == names["lerobots"]
    kept = {path.name: path.read_bytes() for path in (tmp_path / "ours").glob("policy_*")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "plain").glob("policy_*")} == kept
    state = {"observation.state": torch.ones(2, 2), "task": ["pick"] * 2, "action": torch.ones(2, 4, 3)}
    pictures = {key: make_batch()[key] for key in config.image_features}
    processed = [
        make_pre_post_processors(config, pretrained_path=str(tmp_path / folder))[0](dict(state | pictures))
        for folder in ("ours", "plain")
    ]
    assert processed[0].keys() == processed[1].keys()
    assert torch.equal(processed[0]["observation.language.tokens"], processed[1]["observation.language.tokens"])
    assert torch.equal(processed[0]["action"], processed[1]["action"])


def test_at_full_size_the_weights_left_are_those_of_lerobots_policy() -> None:
    """Names and shapes, without memory: what is exported of the full size is what stock LeRobot loads."""
    spec = dataclasses.replace(make_spec(), grid="14x14", grid_hw=(14, 14))
    config = make_config(
        geom_mode="align", model_size="full", image_resolution=(224, 224), max_action_dim=32, spec=spec
    )
    with torch.device("meta"):
        stock = modeling_pi05.PI05Pytorch(PI05Config(device="cpu")).state_dict()
        ours = PI05GeometryPytorch(config).state_dict()
    prefixes = tuple(part_prefix(part).removeprefix("model.") for part in PARTS)
    kept = {name: value.shape for name, value in ours.items() if not name.startswith(prefixes)}
    assert kept == {name: value.shape for name, value in stock.items()}
    assert len(ours) == len(stock) + 6


def test_options_of_lerobot_stay() -> None:
    saved = {"type": "pi05_geometry", "chunk_size": 7, "n_action_steps": 3, "geom_mode": "align", "device": "cpu"}
    assert plain_config(saved) == {"type": "pi05", "chunk_size": 7, "n_action_steps": 3, "device": "cpu"}


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: None) -> None:
    for mode in ("prefix", "both"):
        checkpoint(tmp_path / mode, geom_mode=mode)
        with pytest.raises(UserInputError, match=rf"geom_mode={mode}"):
            export_plain(str(tmp_path / mode), tmp_path / "out")
    make_plain_policy(monkeypatch).save_pretrained(tmp_path / "plain")
    with pytest.raises(ModelError, match="plain pi05"):
        export_plain(str(tmp_path / "plain"), tmp_path / "out")
    policy = checkpoint(tmp_path / "align", geom_mode="align")
    with pytest.raises(UserInputError, match="expected a new folder"):
        export_plain(str(tmp_path / "align"), tmp_path / "plain")
    for processor in make_pi05_geometry_pre_post_processors(policy.config, STATS):
        processor.save_pretrained(tmp_path / "align")
    with pytest.raises(UserInputError, match="geomcache_bytes_tokenizer in policy_preprocessor"):
        export_plain(str(tmp_path / "align"), tmp_path / "out")
    (tmp_path / "align" / "model.safetensors").write_bytes(b"12345678 no weights")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        export_plain(str(tmp_path / "align"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # no draft is left


def test_a_processors_file_cannot_lead_out_of_the_folder(tmp_path: Path, tokenizer: None) -> None:
    checkpoint(tmp_path / "ours", geom_mode="align")
    file = tmp_path / "ours" / "policy_preprocessor.json"
    config = json.loads(file.read_text())
    (with_state,) = (step for step in config["steps"] if "state_file" in step)
    with_state["state_file"] = "../escaped.safetensors"
    file.write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "escaped.safetensors")
    with pytest.raises(ModelError, match=r"\.\./escaped\.safetensors"):
        export_plain(str(tmp_path / "ours"), tmp_path / "plain")


def test_a_policy_with_geometry_switched_off_can_be_exported(tmp_path: Path, tokenizer: None) -> None:
    policy = checkpoint(tmp_path / "ours", use_geom_prefix=False)
    lines = export_plain(str(tmp_path / "ours"), tmp_path / "plain")
    assert lines[-1] == "left out: nothing"
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(torch.equal(policy.state_dict()[name], value) for name, value in weights.items())


def test_what_a_processor_keeps_next_to_it_goes_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: None
) -> None:
    """Write a tokenizer as LeRobot 0.6.2 saves it: a folder that a step names."""
    checkpoint(tmp_path / "ours", geom_mode="align")
    file = tmp_path / "ours" / "policy_preprocessor.json"
    saved = json.loads(file.read_text())
    saved["steps"][0]["artifacts"] = {"tokenizer_name": "kept"}
    file.write_text(json.dumps(saved))
    assert call(monkeypatch, "export-plain", tmp_path / "ours", tmp_path / "none") == 2
    assert "kept" in capsys.readouterr().err
    (tmp_path / "ours" / "kept").mkdir()
    (tmp_path / "ours" / "kept" / "words.json").write_text("{}")
    assert call(monkeypatch, "export-plain", tmp_path / "ours", tmp_path / "plain") == 0
    assert (tmp_path / "plain" / "kept" / "words.json").read_text() == "{}"
    saved["steps"][0]["artifacts"] = {"tokenizer_name": "../elsewhere"}
    file.write_text(json.dumps(saved))
    assert call(monkeypatch, "export-plain", tmp_path / "ours", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()
