"""Does a policy know where its cameras are, and in which layer? A linear probe to cached geometry tells."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geomcache.adapter import channel_statistics
from geomcache.cache.store import GeometryStore
from geomcache.errors import DatasetError, ModelError, UserInputError, one_line
from geomcache.geometry import OUTPUTS, Geometry, GeometrySpec
from geomcache.lerobot_options import short_ffmpeg_warning
from geomcache.policy.alignment import geometry_target
from geomcache.policy.image_tokens import HiddenStates, picture_areas, prefix_norms, tokens_of_views
from geomcache.ranges import rows_of
from geomcache.training.dataset import GeometryDataset
from geomcache.training.linear_probe import LinearProbe

HELD_OUT = 0.25  # share of the episodes, and of the frames
LEAST_FRAMES = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PolicyProbe:
    """What can be read off a policy's image tokens, layer by layer."""

    fitted: int
    """Frames that the probes were fitted to."""
    measured: int
    """Frames of other episodes, by which they were measured."""
    held_out_episodes: tuple[int, ...]
    layers: tuple[dict[str, float | None], ...]
    """R² by quantity, of what enters the language model (0) and of what leaves each of its layers; None where the
    quantity does not change."""

    def to_dict(self) -> dict[str, Any]:
        """Return the probe as JSON types."""
        data = dataclasses.asdict(self)
        return data | {"held_out_episodes": list(self.held_out_episodes), "layers": list(self.layers)}

    def lines(self) -> list[str]:
        """Return a table for the user."""
        names = list(self.layers[0])
        table = [
            f"{number:>5}" + "".join(f"{_shown(layer[name]):>{len(name) + 2}}" for name in names)
            for number, layer in enumerate(self.layers)
        ]
        return [
            f"R² of a linear probe, fitted to {self.fitted} frames, on {self.measured} frames of other episodes",
            "layer" + "".join(f"  {name}" for name in names),
            *table,
            "1: all change over time can be read off; 0: no more than the mean of each place; -: nothing changes",
        ]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def probe_policy(
    checkpoint: str,
    cache: str | Path,
    *,
    dataset: str | None = None,
    root: Path | None = None,
    revision: str | None = None,
    frames: int = 256,
    batch_size: int = 8,
    device: str | None = None,
    seed: int = 0,
) -> PolicyProbe:
    """Fit a linear probe from each layer's image tokens to cached geometry, and measure it on held-out episodes.

    Args:
        checkpoint: folder or Hub id of a checkpoint of Pi0.5 or Pi0, with geometry or plain.
        cache: path of a cache of the dataset.
        dataset: name of the dataset; None for the cache's.
        root: its folder, if it is on this machine.
        revision: its branch, tag or commit on the Hub; None for the cache's.
        frames: how many to take, at random. A quarter of the episodes is held out, and of the frames.
        batch_size: frames that go through the policy at once.
        device: such as ``cuda`` or ``cpu``; None for the checkpoint's, where this machine has it.
        seed: of the choice of episodes and frames.

    Raises:
        UserInputError: there are too few frames or episodes, or the policy does not see the cache's cameras.
        CacheError: there is no such cache, or it is not of this dataset.
        DatasetError: the dataset is not available or cannot be read.
        ModelError: the checkpoint is not available or does not fit.
    """
    if frames < LEAST_FRAMES:
        raise UserInputError(f"frames: expected at least {LEAST_FRAMES}, got {frames}")
    if batch_size < 1:
        raise UserInputError(f"batch-size: expected at least 1, got {batch_size}")
    with GeometryStore.open(cache) as store:
        fitted, measured = choose_rows(store, frames, seed)
        subject = Subject.load(checkpoint, device, store)
        episodes = [store.locate(row)[0] for row in (*fitted.tolist(), *measured.tolist())]
        opened = _open(store, sorted(set(episodes)), dataset=dataset, root=root, revision=revision)
        probes: list[LinearProbe] = []
        with contextlib.closing(subject):
            for hidden, target in subject.read(opened, fitted, batch_size):
                if not probes:
                    probes = [LinearProbe(target.shape[1], each.shape[2], target.shape[2]) for each in hidden]
                for probe, states in zip(probes, hidden, strict=True):
                    probe.fit(states, target)
            for probe in probes:
                probe.solve()
            for hidden, target in subject.read(opened, measured, batch_size):
                for probe, states in zip(probes, hidden, strict=True):
                    probe.measure(states, target)
    layers = [{name: probe.r2(channels) for name, channels in quantities(store.spec).items()} for probe in probes]
    held_out = sorted({store.locate(row)[0] for row in measured.tolist()})
    return PolicyProbe(
        fitted=len(fitted), measured=len(measured), held_out_episodes=tuple(held_out), layers=tuple(layers)
    )


def choose_rows(store: GeometryStore, frames: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose rows of a cache at random, sorted: to fit to, and of other episodes to measure by.

    Raises:
        UserInputError: the cache has fewer than two whole episodes.
    """
    episodes = rows_of(store.episodes())
    if len(episodes) < 2:
        raise UserInputError(
            f"cache {store.path}: expected at least 2 episodes, to fit to and to measure by, found {len(episodes)}"
        )
    generator = np.random.default_rng(seed)
    order = generator.permutation(episodes)
    held_out = max(1, round(HELD_OUT * len(order)))

    def some(of: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        starts = store.episode_start[of]
        rows = rows_of(zip(starts.tolist(), (starts + store.episode_length[of]).tolist(), strict=True))
        return np.sort(generator.permutation(rows)[:count])

    measured = max(1, round(HELD_OUT * frames))
    return some(order[held_out:], frames - measured), some(order[:held_out], measured)


def quantities(spec: GeometrySpec) -> dict[str, slice]:
    """Return what is measured of a cache's outputs, with its channels."""
    named = {"ray direction": slice(0, 3), "ray origin": slice(3, 6)}
    if "depth" in spec.outputs:
        before = spec.channels.index(OUTPUTS["depth"].channels[0])
        named["depth"] = slice(before, before + 1)
    return named


class Subject:
    """A policy whose hidden states are read, its processor, and the statistics that targets are standardised by."""

    def __init__(self, policy: Any, preprocess: Any, store: GeometryStore) -> None:
        """Watch a `PaliGemmaPolicy`; `preprocess` is LeRobot's pipeline of its checkpoint.

        Raises:
            UserInputError: the policy does not see a camera of the cache.
        """
        names = {name: new for step in preprocess.steps for name, new in getattr(step, "rename_map", {}).items()}
        self.policy, self.preprocess = policy, preprocess
        self.keys = [names.get(key, key) for key in store.spec.camera_keys]
        unseen = [key for key in self.keys if key not in policy.config.image_features]
        if unseen:
            raise UserInputError(
                f"policy: expected one that sees the cache's cameras, it does not see {', '.join(unseen)}, it sees"
                f" {', '.join(policy.config.image_features)}: take a cache of its cameras"
            )
        self._mean, self._std = channel_statistics(store.statistics)
        network = policy.model.paligemma_with_expert
        self._states = HiddenStates(network, range(len(prefix_norms(network))))

    @classmethod
    def load(cls, checkpoint: str, device: str | None, store: GeometryStore) -> "Subject":
        """Load a checkpoint with its processors.

        Raises:
            UserInputError: the policy does not see a camera of the cache.
            ModelError: the checkpoint is not available, does not fit, or is of a policy without such tokens.
        """
        from lerobot.configs import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class, make_pre_post_processors

        from geomcache.policy.checkpoint import read_config
        from geomcache.policy.options import as_geometry_config

        saved = read_config(checkpoint)
        if saved["type"].startswith("smolvla"):
            raise ModelError(
                f"policy {checkpoint}: expected Pi0.5 or Pi0, whose image tokens are patches of the picture, found"
                f" {saved['type']}: give another checkpoint"
            )
        config = as_geometry_config(PreTrainedConfig.from_pretrained(checkpoint))
        if device is not None:
            config.device = device
        policy = get_policy_class(config.type).from_pretrained(checkpoint, config=config)
        if config.has_tokens:
            logger.warning(
                "policy %s reads geometry tokens: its image tokens may copy geometry from them, which no picture told",
                checkpoint,
            )
        on_device = {"device_processor": {"device": str(config.device)}}
        preprocess, _ = make_pre_post_processors(config, pretrained_path=checkpoint, preprocessor_overrides=on_device)
        return cls(policy, preprocess, store)

    def read(
        self, dataset: GeometryDataset, rows: NDArray[np.int64], batch_size: int
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Yield hidden states [B, T, D] by layer, and targets [B, T, C], of these rows; T are tokens of pictures."""
        from lerobot.utils.collate import lerobot_collate_fn

        indices = dataset.hf_dataset.data.column("index").to_numpy()  # ascend; some episodes may be left out
        positions = np.searchsorted(indices, rows)
        for start in range(0, len(positions), batch_size):
            batch = lerobot_collate_fn(dataset.__getitems__(positions[start : start + batch_size].tolist()))
            pictures = {
                key: batch[key].float() / 255 for key in dataset.meta.camera_keys if batch[key].dtype == torch.uint8
            }
            yield self.read_batch(self.preprocess(batch | pictures))

    def read_batch(self, batch: dict[str, Any]) -> tuple[list[Tensor], Tensor]:
        """Return hidden states and targets of a batch that went through the processor."""
        config = self.policy.config
        side = config.image_resolution[0]
        with torch.no_grad(), self._states.kept() as kept:
            self.policy.predict_action_chunk(batch, num_steps=1)
        present = [key for key in config.image_features if key in batch]  # in LeRobot's order
        areas = picture_areas(batch, self.keys, side)
        target = geometry_target(Geometry.from_batch(batch), self._mean, self._std, areas)
        known = target.known[0].flatten()  # the same in every frame
        hidden = [
            tokens_of_views(kept[layer], self.keys, present, side).flatten(1, 2)[:, known].cpu()
            for layer in sorted(kept)
        ]
        return hidden, target.values.flatten(1, 2)[:, known].cpu()

    def close(self) -> None:
        """Stop watching the policy."""
        self._states.remove()


def _open(
    store: GeometryStore, episodes: Sequence[int], *, dataset: str | None, root: Path | None, revision: str | None
) -> GeometryDataset:
    import httpx
    from lerobot.datasets import LeRobotDataset

    repo_id = dataset or store.dataset.repo_id
    try:
        with short_ffmpeg_warning():
            opened = LeRobotDataset(
                repo_id,
                root=root,
                revision=revision if revision or root else store.dataset.revision,
                episodes=list(episodes),
            )
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise DatasetError(f"dataset {repo_id}: LeRobot cannot open it: {one_line(error)}") from error
    return GeometryDataset(opened, store)
