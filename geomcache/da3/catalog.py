"""Depth Anything 3 models: which are published, and where the files of one are. Imports nothing heavy.

Names, licenses and replacements are those of upstream's README (depth-anything-3 0.1.1, "Model Cards"). The ``-1.1``
models have the architecture of the ones they replace: they were trained again after a bug was fixed.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from geomcache.errors import ModelError, ModelNotFoundError, UserInputError, did_you_mean
from geomcache.waits import hub_call

HUB_OWNER = "depth-anything"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A model of upstream's list."""

    name: str
    """As upstream writes it, such as ``DA3-LARGE-1.1``."""
    preset: str
    """Upstream's configuration, such as ``da3-large``: the architecture."""
    license: str
    """Licence of the weights in upstream's README; the model's Hub page can say otherwise."""
    ray_head: bool = True
    """Whether the model predicts rays. geomcache can use no other."""
    replaced_by: str | None = None
    """The name of the model that upstream recommends instead."""

    @property
    def hub_id(self) -> str:
        """Return the repository on the Hub."""
        return f"{HUB_OWNER}/{self.name}"

    @property
    def parameters(self) -> int:
        """Return the parameters of the whole network, including camera decoder, gaussians and metric branch."""
        return _PARAMETERS[self.preset]


# Counted in upstream's networks, built from its configurations without memory for weights; a test counts again.
_PARAMETERS = {
    "da3-small": 34_299_463,
    "da3-base": 135_366_599,
    "da3-large": 410_941_767,
    "da3-giant": 1_355_674_125,
    "da3nested-giant-large": 1_689_845_519,
    "da3metric-large": 334_171_394,
    "da3mono-large": 334_171_394,
}
_FREE, _NON_COMMERCIAL = "Apache-2.0", "CC BY-NC 4.0"

MODELS: dict[str, PublishedModel] = {
    model.name: model
    for model in (
        PublishedModel(name="DA3-SMALL", preset="da3-small", license=_FREE),
        PublishedModel(name="DA3-BASE", preset="da3-base", license=_FREE),
        PublishedModel(name="DA3-LARGE", preset="da3-large", license=_NON_COMMERCIAL, replaced_by="DA3-LARGE-1.1"),
        PublishedModel(name="DA3-LARGE-1.1", preset="da3-large", license=_NON_COMMERCIAL),
        PublishedModel(name="DA3-GIANT", preset="da3-giant", license=_NON_COMMERCIAL, replaced_by="DA3-GIANT-1.1"),
        PublishedModel(name="DA3-GIANT-1.1", preset="da3-giant", license=_NON_COMMERCIAL),
        PublishedModel(
            name="DA3NESTED-GIANT-LARGE",
            preset="da3nested-giant-large",
            license=_NON_COMMERCIAL,
            replaced_by="DA3NESTED-GIANT-LARGE-1.1",
        ),
        PublishedModel(name="DA3NESTED-GIANT-LARGE-1.1", preset="da3nested-giant-large", license=_NON_COMMERCIAL),
        PublishedModel(name="DA3METRIC-LARGE", preset="da3metric-large", license=_FREE, ray_head=False),
        PublishedModel(name="DA3MONO-LARGE", preset="da3mono-large", license=_FREE, ray_head=False),
    )
}


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model whose files are on this machine."""

    model_id: str
    """The published name, the Hub id, or the folder as the user gave it."""
    revision: str | None
    """The commit on the Hub; None for a folder."""
    preset: str
    """Upstream's configuration, read from ``config.json``."""
    weights: Path
    """The ``model.safetensors``."""


def published(name: str) -> PublishedModel | None:
    """Return the published model of this name or Hub id, in any case; None if there is none."""
    return MODELS.get(name.upper().removeprefix(f"{HUB_OWNER.upper()}/"))


def find_model(model: str, revision: str | None = None) -> ModelFiles:
    """Find a model's files in a folder, or on the Hub, which is not asked if the folder exists.

    Args:
        model: a folder with ``config.json`` and ``model.safetensors``, a published name in any case, or a Hub id.
        revision: branch, tag or commit on the Hub; None for a folder, or for the Hub's main branch.

    Raises:
        ModelNotFoundError: there is no such folder, it lacks the files, or the Hub does not give them.
        ModelError: the name is unknown, the model has no ray head, or its files are of another kind.
        UserInputError: a revision was given for a folder.
    """
    folder, known = Path(model).expanduser(), published(model)
    path_like = model.startswith((".", "/", "~")) or "\\" in model
    on_hub = known is not None or (not path_like and re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None)
    if model and folder.exists() and not (on_hub and revision is not None):
        return _read_folder(model, folder, revision)
    if known is not None and not known.ray_head:
        raise _no_ray_head(known.name)
    if on_hub:
        return _download(known.name, known.hub_id, revision) if known else _download(model, model, revision)
    if path_like or "/" in model:
        raise ModelNotFoundError(f"model {model}: there is no such folder")
    raise ModelError(
        f"model {model!r}: {did_you_mean(model, MODELS)}expected one of {_usable_names()}, a Hub id such as"
        f" {HUB_OWNER}/DA3-SMALL, or a folder"
    )


def _usable_names() -> str:
    return ", ".join(model.name for model in MODELS.values() if model.ray_head)


def _no_ray_head(model: str) -> ModelError:
    return ModelError(f"model {model}: it has no ray head, which geometry needs: take one of {_usable_names()}")


def _read_folder(model: str, folder: Path, revision: str | None) -> ModelFiles:
    if not folder.is_dir():
        raise ModelError(
            f"model {model}: expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, found a file: give its folder"
        )
    if revision is not None:
        raise UserInputError(f"revision: expected none for the folder {model}, got {revision!r}")
    preset = _read_preset(folder / CONFIG_FILE, model)
    return ModelFiles(model_id=model, revision=None, preset=preset, weights=_weights_of_folder(folder, model))


def _read_preset(config: Path, model: str) -> str:
    """Return the name of upstream's configuration from a ``config.json``; the model must have a ray head."""
    try:
        content = json.loads(config.read_bytes())
    except OSError as error:
        raise ModelNotFoundError(
            f"model {model}: expected {CONFIG_FILE} and {WEIGHTS_FILE}, cannot read {config} ({error.strerror}): give a"
            " folder that upstream's save_pretrained wrote or that was downloaded from the Hub"
        ) from None
    except ValueError as error:
        raise ModelError(f"model {model}: expected JSON in {config}, found something else ({error})") from None
    name = content.get("model_name") if isinstance(content, dict) else None
    presets = {entry.preset: entry.ray_head for entry in MODELS.values()}
    known = published(name) if isinstance(name, str) else None
    preset = known.preset if known is not None else name
    if not isinstance(preset, str) or preset not in presets:
        raise ModelError(
            f"model {model}: expected model_name in {config} to be one of {', '.join(presets)}, got {name!r}"
        )
    if not presets[preset]:
        raise _no_ray_head(f"{model} ({preset})")
    return preset


def _weights_of_folder(folder: Path, model: str) -> Path:
    weights = folder / WEIGHTS_FILE
    if weights.is_file():
        return weights
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".ckpt", ".pt", ".pth"))
    if pickles:
        raise ModelError(
            f"model {model}: expected {WEIGHTS_FILE}, found {pickles[0]}: pickled weights can run code and are not"
            " loaded; convert them with safetensors"
        )
    raise ModelNotFoundError(f"model {model}: expected {WEIGHTS_FILE} in {folder}, found none: download it again")


def _download(model_id: str, hub_id: str, revision: str | None) -> ModelFiles:
    """Download a model, or take it from the Hub's local cache; the weights only once the configuration is usable."""
    config = _download_file(hub_id, CONFIG_FILE, revision)
    preset = _read_preset(config, model_id)
    commit = config.parent.name  # of the cache's layout: snapshots/<commit>/<file>
    return ModelFiles(
        model_id=model_id, revision=commit, preset=preset, weights=_download_file(hub_id, WEIGHTS_FILE, commit)
    )


def _download_file(hub_id: str, file: str, revision: str | None) -> Path:
    import httpx
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    elsewhere = (
        f"or download it elsewhere (hf download {hub_id} {CONFIG_FILE} {WEIGHTS_FILE} --local-dir DIR) and give DIR"
    )
    try:
        with hub_call(f"model {hub_id}: waiting for {file} from the Hub"):
            return Path(hf_hub_download(hub_id, file, revision=revision))
    except HFValidationError:
        raise ModelError(f"model {hub_id!r}: neither a folder here nor an id that the Hub accepts") from None
    except GatedRepoError:
        raise ModelNotFoundError(
            f"model {hub_id}: the Hub gives it only after consent: agree on its page there and run `hf auth login`,"
            f" {elsewhere}"
        ) from None
    except RepositoryNotFoundError:
        raise ModelNotFoundError(
            f"model {hub_id}: neither a folder here nor a public model on the Hub: check the id; for a private one run"
            f" `hf auth login`, {elsewhere}"
        ) from None
    except RevisionNotFoundError:
        raise ModelNotFoundError(f"model {hub_id}: the Hub has no revision {revision!r} of it") from None
    except RemoteEntryNotFoundError:
        raise ModelNotFoundError(
            f"model {hub_id}: expected {file} on the Hub, found none: is it a DA3 model?"
        ) from None
    except (OSError, httpx.HTTPError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ModelNotFoundError(
            f"model {hub_id}: no such folder, {file} is not in the Hub's cache here, and getting it from the Hub"
            f" failed ({reason}): check the connection, {elsewhere}"
        ) from error
