"""The table of published models against upstream's package, and finding a model's files."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import huggingface_hub
import huggingface_hub.constants
import pytest
from huggingface_hub import errors as hub

from geomcache.da3.catalog import MODELS, find_model, published
from geomcache.da3.weights import sha256
from geomcache.errors import ModelError, ModelNotFoundError, UserInputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub is out of reach, and its cache on this machine is empty."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def hub_answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Every download fails with the given error."""

    def answer(error: Exception) -> None:
        def download(*_: object, **__: object) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)

    return answer


def write_model(folder: Path, model_name: str = "da3-small") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(f'{{"model_name": "{model_name}"}}')
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def write_hub_cache(cache: Path, hub_id: str, model_name: str) -> None:
    """As huggingface_hub lays a downloaded model out."""
    repository = cache / ("models--" + hub_id.replace("/", "--"))
    write_model(repository / "snapshots" / COMMIT, model_name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


# The table


def test_presets_and_ray_heads_are_upstreams() -> None:
    from depth_anything_3.cfg import load_config
    from depth_anything_3.registry import MODEL_REGISTRY

    assert {model.preset for model in MODELS.values()} == set(MODEL_REGISTRY)
    for model in MODELS.values():
        config = load_config(MODEL_REGISTRY[model.preset])
        head = config.anyview.head if "anyview" in config else config.head
        assert model.ray_head == (head.__object__.name == "DualDPT"), model.name


def test_parameters_are_those_of_upstreams_networks() -> None:
    from accelerate import init_empty_weights
    from depth_anything_3.cfg import create_object, load_config
    from depth_anything_3.registry import MODEL_REGISTRY

    for model in MODELS.values():
        config = load_config(MODEL_REGISTRY[model.preset])
        branches = (config.anyview, config.metric) if "anyview" in config else (config,)
        # `gs_adapter`, the one part that is left out, has no parameters, and imports what is not installed here
        parts = ("net", "head", "cam_enc", "cam_dec", "gs_head")
        assert {name for branch in branches for name in branch} - {*parts} <= {"__object__", "gs_adapter"}
        with init_empty_weights():
            networks = [create_object(branch[part]) for branch in branches for part in parts if part in branch]
        counted = sum(parameter.numel() for network in networks for parameter in network.parameters())
        assert model.parameters == counted, model.name


def test_replacements_are_published_and_of_the_same_architecture() -> None:
    replaced = {model.name: model.replaced_by for model in MODELS.values() if model.replaced_by is not None}
    assert list(replaced) == ["DA3-LARGE", "DA3-GIANT", "DA3NESTED-GIANT-LARGE"]
    for name, replacement in replaced.items():
        assert MODELS[replacement].preset == MODELS[name].preset
        assert replacement == name + "-1.1"


def test_hub_ids_and_licenses() -> None:
    assert MODELS["DA3-SMALL"].hub_id == "depth-anything/DA3-SMALL"
    free = {model.name for model in MODELS.values() if model.license == "Apache-2.0"}
    assert free == {"DA3-SMALL", "DA3-BASE", "DA3METRIC-LARGE", "DA3MONO-LARGE"}
    assert {model.license for model in MODELS.values()} == {"Apache-2.0", "CC BY-NC 4.0"}


@pytest.mark.parametrize("name", ["DA3-LARGE-1.1", "da3-large-1.1", "Da3-Large-1.1", "depth-anything/da3-LARGE-1.1"])
def test_names_in_any_case(name: str) -> None:
    found = published(name)
    assert found is not None
    assert (found.name, found.preset) == ("DA3-LARGE-1.1", "da3-large")
    assert published("somebody/DA3-LARGE-1.1") is None


def test_no_heavy_imports() -> None:
    script = (
        "import sys, geomcache.da3.catalog; print(sorted({'torch', 'numpy', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Folders


@pytest.mark.parametrize("model_name", ["da3-large", "DA3-LARGE-1.1"])
def test_folder(tmp_path: Path, hub_answers: Callable[[Exception], None], model_name: str) -> None:
    hub_answers(AssertionError("the Hub was asked for a folder"))
    folder = write_model(tmp_path / "model", model_name)
    files = find_model(str(folder))
    assert (files.model_id, files.revision, files.preset) == (str(folder), None, "da3-large")
    assert files.weights == folder / "model.safetensors"


def test_a_folder_comes_before_a_published_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_answers: Callable[[Exception], None]
) -> None:
    hub_answers(AssertionError("the Hub was asked for a folder"))
    write_model(tmp_path / "DA3-BASE", "da3-base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("DA3-BASE").weights == Path("DA3-BASE/model.safetensors")
    assert find_model("~/DA3-BASE").weights == tmp_path / "DA3-BASE/model.safetensors"


def test_a_revision_is_the_hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_cache: Path) -> None:
    write_model(tmp_path / "DA3-BASE", "da3-base")
    write_hub_cache(hub_cache, "depth-anything/DA3-BASE", "da3-base")
    monkeypatch.chdir(tmp_path)
    assert find_model("DA3-BASE", COMMIT).revision == COMMIT  # a cache made with the Hub's model says so


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, ModelNotFoundError, "expected config.json and model.safetensors, cannot read"),
        ({"model.safetensors": ""}, ModelNotFoundError, "No such file or directory"),
        ({"config.json": '{"model_name": "da3-small"}'}, ModelNotFoundError, "expected model.safetensors in"),
        (
            {"config.json": '{"model_name": "da3-small"}', "pytorch_model.bin": ""},
            ModelError,
            "found pytorch_model.bin: pickled weights can run code and are not loaded",
        ),
        ({"config.json": '{"model_name": "da3-small"}', "model.pt": ""}, ModelError, "found model.pt: pickled"),
        ({"config.json": "{"}, ModelError, "expected JSON in"),
        ({"config.json": "\xff"}, ModelError, "expected JSON in"),
        ({"config.json": "[]"}, ModelError, "to be one of da3-small, da3-base, "),
        ({"config.json": "{}"}, ModelError, "got None"),
        ({"config.json": '{"model_name": ["da3-small"]}'}, ModelError, "got ['da3-small']"),
        ({"config.json": '{"model_name": "vggt"}'}, ModelError, "got 'vggt'"),
        ({"config.json": '{"model_name": "da3mono-large"}'}, ModelError, "it has no ray head"),
    ],
)
def test_folders_that_are_no_models(
    tmp_path: Path, files: dict[str, str], error: type[ModelError], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(error, match=re.escape(message)) as caught:
        find_model(str(tmp_path))
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    with pytest.raises(ModelError, match=r"config\.json.*model\.safetensors"):
        find_model(str(folder / "model.safetensors"))


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"revision: .* 'main'"):
        find_model(str(write_model(tmp_path)), revision="main")


@pytest.mark.parametrize("model", ["/nowhere/da3", "./da3", "../da3", "~/nowhere/da3", "runs/2/da3", "C:\\da3"])
def test_folders_that_are_not_there(model: str, hub_answers: Callable[[Exception], None]) -> None:
    hub_answers(AssertionError("the Hub was asked for a folder"))
    with pytest.raises(ModelNotFoundError, match=re.escape(f"model {model}: ")):
        find_model(model)


# Names and the Hub


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        ("DA3-SMAL", "did you mean DA3-SMALL?"),
        ("da3_large", "did you mean DA3-LARGE?"),
        ("DA3-LARGE-1.2", "did you mean DA3-LARGE-1.1?"),
        ("vggt", "'vggt': expected one of DA3-SMALL, DA3-BASE, "),
        ("", "model '': expected one of"),
    ],
)
def test_unknown_names(model: str, hint: str, hub_answers: Callable[[Exception], None]) -> None:
    hub_answers(AssertionError("the Hub was asked for an unknown name"))
    with pytest.raises(ModelError, match=re.escape(hint)) as caught:
        find_model(model)
    assert "MONO" not in str(caught.value)


@pytest.mark.parametrize("model", ["DA3MONO-LARGE", "da3metric-large", "depth-anything/DA3Metric-Large"])
def test_models_without_a_ray_head(model: str, hub_answers: Callable[[Exception], None]) -> None:
    hub_answers(AssertionError("the Hub was asked for a model of no use"))
    message = (
        "it has no ray head, which geometry needs: take one of DA3-SMALL, DA3-BASE, DA3-LARGE, DA3-LARGE-1.1, DA3-G"
    )
    with pytest.raises(ModelError, match=re.escape(message)):
        find_model(model)


@pytest.mark.parametrize(
    ("model", "revision", "hub_id", "model_id"),
    [
        ("da3-large-1.1", None, "depth-anything/DA3-LARGE-1.1", "DA3-LARGE-1.1"),
        ("depth-anything/da3-large-1.1", COMMIT, "depth-anything/DA3-LARGE-1.1", "DA3-LARGE-1.1"),
        ("somebody/finetuned", None, "somebody/finetuned", "somebody/finetuned"),
    ],
)
def test_the_hubs_cache_is_enough(
    hub_cache: Path, model: str, revision: str | None, hub_id: str, model_id: str
) -> None:
    write_hub_cache(hub_cache, hub_id, "da3-large")
    files = find_model(model, revision)
    assert (files.model_id, files.revision, files.preset) == (model_id, COMMIT, "da3-large")
    assert files.weights.read_bytes() == b"weights"


def test_a_model_without_a_ray_head_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / COMMIT, "da3mono-large")

    def download(_hub_id: str, file: str, **_: object) -> str:
        assert file == "config.json"
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ModelError, match=r"model somebody/mono \(da3mono-large\): "):
        find_model("somebody/mono")


def test_both_files_are_of_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / COMMIT)
    asked = []

    def download(hub_id: str, file: str, revision: str | None) -> str:
        asked.append((hub_id, file, revision))
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    find_model("DA3-SMALL", "v1")
    hub_id = "depth-anything/DA3-SMALL"
    assert asked == [(hub_id, "config.json", "v1"), (hub_id, "model.safetensors", COMMIT)]


@pytest.mark.parametrize("revision", [None, COMMIT])
def test_a_hub_out_of_reach(hub_cache: Path, revision: str | None) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        find_model("DA3-SMALL", revision)
    message = str(caught.value)
    assert "model depth-anything/DA3-SMALL: no such folder, config.json is not in the Hub's cache here" in message
    assert "offline mode is enabled" in message  # the reason
    assert "hf download depth-anything/DA3-SMALL config.json model.safetensors --local-dir DIR" in message
    assert "\n" not in message


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "http://hub.invalid/x"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub.GatedRepoError("gated\ntext", response=response(403)), "the Hub gives it only after consent"),
        (hub.RepositoryNotFoundError("none\ntext", response=response(401)), "neither a folder here nor a public model"),
        (hub.RevisionNotFoundError("no", response=response(404)), "the Hub has no revision 'v9' of it"),
        (hub.RemoteEntryNotFoundError("no", response=response(404)), "expected config.json on the Hub, found none"),
        (hub.HfHubHTTPError("busy\nlater", response=response(503)), "getting it from the Hub failed (busy): check the"),
        (httpx.ConnectTimeout("slow"), "getting it from the Hub failed (slow): check the connection"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_what_the_hub_answers(hub_answers: Callable[[Exception], None], error: Exception, message: str) -> None:
    hub_answers(error)
    with pytest.raises(ModelNotFoundError, match=re.escape(message)) as caught:
        find_model("somebody/some-model", "v9")
    assert "somebody/some-model" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_id_that_the_hub_does_not_accept() -> None:
    with pytest.raises(ModelError, match="neither a folder here nor an id that the Hub accepts"):
        find_model("some--body/model-.")


# The identity of weights


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(ModelError, match="Is a directory"):
        sha256(tmp_path)
