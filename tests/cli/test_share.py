"""The commands that share caches, as they are typed."""

import json
from pathlib import Path

import pytest

from geomcache.cli import main as cli
from tests.support.cli import call
from tests.support.sharing import contents, make_small_store


def test_push_pull_and_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, address = make_small_store(tmp_path / "here.zarr"), f"file://{tmp_path}/there.zarr"
    assert call(monkeypatch, "push", path, address, "--verify") == 0
    assert f"geomcache pull {address} PATH" in capsys.readouterr().out
    assert call(monkeypatch, "pull", address, tmp_path / "copy.zarr", "--episodes", "0:2") == 0
    assert "complete episodes: 0:2" in capsys.readouterr().out
    assert call(monkeypatch, "pull", address, tmp_path / "copy.zarr") == 0
    assert contents(tmp_path / "copy.zarr") == contents(path)
    capsys.readouterr()
    for arguments, part in (
        (["pull", f"file://{tmp_path}/none.zarr", tmp_path / "none"], "found no zarr.json"),
        (["pull", address, tmp_path / "none", "--episodes", "7"], "0:4"),
        (["push", tmp_path / "none", address], "found nothing"),
        (["push", path, "elsewhere"], "got a path"),
        (["train", "--cache", f"file://{tmp_path}/none.zarr"], "found no zarr.json"),
    ):
        assert call(monkeypatch, *arguments) == cli.EXIT_USER_ERROR
        message = capsys.readouterr().err
        assert part in message
        assert message.count("\n") == 1


def test_training_gets_the_copy_of_a_cache_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = make_small_store(tmp_path / "there.zarr")
    monkeypatch.setenv("GEOMCACHE_HOME", str(tmp_path / "home"))
    given: list[tuple[str, list[str]]] = []
    given_options = ["--config_path=train_config.json", "--steps=1"]  # the file leaves nothing to choose
    monkeypatch.setattr("geomcache.training.trainer.train", lambda cache, args, **_: given.append((cache, args)))
    assert call(monkeypatch, "train", "--cache", f"file://{there}", "--pull", *given_options) == 0
    ((path, arguments),) = given
    cache = Path(path)
    assert cache.parent == tmp_path / "home"
    assert contents(cache) == contents(there)
    assert arguments == given_options
    assert str(tmp_path / "home") in capsys.readouterr().out


def test_models_as_a_table_and_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert call(monkeypatch, "models") == 0
    assert "DA3-LARGE-1.1" in capsys.readouterr().out
    assert call(monkeypatch, "models", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts[0]["parameters"] == 34_299_463


@pytest.mark.parametrize("command", ["push", "pull", "models"])
def test_help_has_an_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert call(monkeypatch, command, "--help") == 0
    assert f"geomcache {command}" in capsys.readouterr().out
