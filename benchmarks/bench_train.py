"""What does a training step cost with geometry from the cache, compared with plain Pi0.5 and with DA3 in the loop?

    python benchmarks/bench_train.py [--da3 DIR] [--process-res 504] [--batch-size 8] [--rounds 10]
                                     [--target-hw 14,10,7,4] [--modes]

With --modes, what the ways of the policy to use geometry cost instead: tokens, the alignment loss, both.

LeRobot's own trainer takes the steps, with the loader and worker processes that `geomcache train` gives it. Its dataset
factory is replaced, and two more of its functions: the one that repeats the loader, so that the ways to train take
turns, and the one that updates, so that the clock is read and geometry is added where no loader brings it. On a GPU the
real sizes: Pi0.5 in bfloat16 with gradient checkpointing, and DA3-LARGE; on a CPU the small variant and DA3-SMALL.
Random weights are good enough: speed does not depend on them.
"""

import argparse
import logging
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate

from benchmarks.common import ROOT, da3_folder, initialised_on, table
from geomcache.cache.store import GeometryStore
from geomcache.geometry import batch_key
from geomcache.training.dataset import GeometryDataset, Item

REPO_ID = "geomcache/bench"
PICTURES = {"observation.images.image": "front.png", "observation.images.image2": "wrist.png"}  # 256x256, as in LIBERO
STATE_DIM, ACTION_DIM = 8, 7
GRID = "36x36"  # the patch grid of 504 px: what is read is of the real size also where the encoder sees less
PLAIN, CONSTANT, CACHED, ONLINE = WAYS = ("(a) plain Pi0.5", "(b) constant tensor", "(c) cache", "(d) DA3 online")
OTHER_GRID = "(c) cache, {side}x{side} tokens"
ALIGN, BOTH, COMPARED = "(e) alignment loss", "(f) tokens and loss", "(g) loss, gradients compared"
MODES = {ALIGN: "align", BOTH: "both", COMPARED: "align"}  # geom_mode of the ways that have not tokens alone
FULL = (
    "--policy.device=cuda",
    "--policy.random_init=true",
    "--policy.dtype=bfloat16",
    "--policy.gradient_checkpointing=true",
    "--policy.tokenizer_name=bytes",  # PaliGemma's is gated
)
SMALL = ("--policy.device=cpu", "--policy.model_size=small", "--policy.image_resolution=[112,112]")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all ways have in common."""

    root: Path
    """A dataset that holds just the frames of one turn: a turn is an epoch."""
    cache: Path
    device: str
    batch_size: int
    steps: int
    """Of a turn."""
    num_workers: int
    target_sides: tuple[int, ...] = (14,)
    """Sides of the square grids that geometry is resampled to; ways other than the cache have only the first."""
    modes: bool = False
    """Compare the modes of the policy."""

    @property
    def sides(self) -> dict[str, int]:
        """The side of each way's target grid."""
        first, *others = self.target_sides
        ways = (PLAIN, CACHED, *MODES) if self.modes else WAYS
        return dict.fromkeys(ways, first) | {OTHER_GRID.format(side=side): side for side in others}

    def options(self, turns: int) -> list[str]:
        """Of `geomcache train`."""
        return [
            *(FULL if self.device == "cuda" else SMALL),
            f"--dataset.repo_id={REPO_ID}",
            f"--dataset.root={self.root}",
            "--dataset.video_backend=pyav",
            f"--output_dir={self.root.parent / 'train'}",
            f"--batch_size={self.batch_size}",
            f"--num_workers={self.num_workers}",
            f"--steps={turns * self.steps}",
            f"--policy.geom_target_hw=[{self.target_sides[0]},{self.target_sides[0]}]",
            f"--policy.geom_mode={'both' if self.modes else 'prefix'}",
            "--save_checkpoint=false",
            "--log_freq=0",
        ]


class InTurn(GeometryDataset):
    """A dataset whose items carry geometry while `from_cache` says so, which the loader's processes share."""

    def __init__(self, dataset: Any, store: GeometryStore, from_cache: Any) -> None:
        super().__init__(dataset, store)
        self.from_cache = from_cache

    def __getitems__(self, positions: Sequence[int]) -> list[Item]:
        if self.from_cache.value:
            return super().__getitems__(positions)
        return [self._dataset[position] for position in positions]


class Turns:
    """The ways to train take turns within one run of the trainer: the same policy, optimizer, loader and batches.

    A turn begins and ends with idle workers: all that they do for its batches falls into its time. (b) is the strictest
    that (c) can be measured by: its geometry lies on the device already, no worker reads it and no loader moves it.

    Attributes:
        seconds: of a step, mean of each turn; the first turn warms up.
        waiting: the part of them in which the trainer fetches and prepares the batch.
        memory: peak in the first turn, before a later way has allocated anything. CUDA: GiB of the device. CPU: MiB of
            the process, and of its largest worker.
    """

    def __init__(self, setup: Setup, ways: Sequence[str], rounds: int, store: GeometryStore) -> None:
        self.ways, self.rounds, self.steps, self.cuda = ways, rounds, setup.steps, setup.device == "cuda"
        self.sides = setup.sides
        self.from_cache = multiprocessing.get_context("spawn").Value("b", 0)
        geometry = store.batch(np.arange(setup.batch_size)).to_batch()
        self.constant = {key: torch.from_numpy(values).to(setup.device) for key, values in geometry.items()}
        self.seconds: dict[str, list[float]] = {way: [] for way in ways}
        self.waiting: dict[str, list[float]] = {way: [] for way in ways}
        self.memory: dict[str, tuple[float, ...]] = {}
        self.order: dict[tuple[int, int], list[int]] = {}  # frames of each round's batches

    def batches(self, loader: Any) -> Iterator[dict[str, Any]]:
        """In place of LeRobot's `cycle`: an epoch for each way, and again. A round's batches are the same."""
        assert len(loader) == self.steps
        for number in range(self.rounds + 1):
            for way in self.ways:
                self.way, self.number, self.step, self.waited = way, number, 0, 0.0
                self.from_cache.value = way not in (PLAIN, CONSTANT, ONLINE)
                loader.iteration = number  # LeRobot's sampler makes its order of it
                self.began = time.perf_counter()
                yield from loader

    def updating(self, upstream: Callable[..., Any]) -> Callable[..., Any]:
        """In place of LeRobot's `update_policy`, which it calls."""

        def update(tracker: Any, policy: Any, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            assert (batch_key("ray") in batch) == bool(self.from_cache.value)
            frames = batch["index"].tolist()
            assert self.order.setdefault((self.number, self.step), frames) == frames
            policy.config.use_geom_prefix = self.way != PLAIN  # off, the same network runs as plain Pi0.5
            policy.config.geom_mode = MODES.get(self.way, "prefix")
            policy.measures_gradients = self.way == COMPARED
            policy.model.geometry_adapter.target_hw = (self.sides[self.way],) * 2
            if self.way == CONSTANT:
                batch = batch | self.constant
            elif self.way == ONLINE:
                batch = batch | policy.geometry_of(batch).to_batch()
            encoding = torch.cuda.max_memory_allocated() if self.cuda else 0  # LeRobot resets it in every step
            result = upstream(tracker, policy, batch, *args, **kwargs)  # waits for the device: it logs the loss
            ended = time.perf_counter()
            self.step += 1
            self.waited += tracker.dataloading_s.val
            if self.step == self.steps:
                self.seconds[self.way].append((ended - self.began) / self.steps)
                self.waiting[self.way].append(self.waited / self.steps)
            if self.number == 0:
                self._note_memory(encoding)
            return result

        return update

    def _note_memory(self, encoding: int) -> None:
        if self.cuda:
            found: tuple[float, ...] = (max(encoding, torch.cuda.max_memory_allocated()) / 2**30,)
        else:
            workers = [peak_memory(str(worker.pid)) for worker in multiprocessing.active_children()]
            found = (peak_memory("self"), max(workers, default=0.0))
        before = self.memory.get(self.way, found)
        self.memory[self.way] = tuple(map(max, before, found))


def peak_memory(process: str) -> float:
    """Peak resident memory, MiB. Not `getrusage`'s, which begins with that of the process that started this one."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def train_in_turn(setup: Setup, ways: Sequence[str], rounds: int) -> Turns:
    """Run LeRobot's trainer once; each way has a turn to warm up and `rounds` more."""
    from lerobot.scripts import lerobot_train

    from geomcache.training import trainer as train

    store = GeometryStore.open(setup.cache)
    turns = Turns(setup, ways, rounds, store)
    config = train.parse_config(setup.options(len(ways) * (rounds + 1)))
    train.bind(config, store)
    make_datasets = lerobot_train.make_train_eval_datasets
    replaced: dict[str, Any] = {
        "make_train_eval_datasets": lambda asked: (InTurn(make_datasets(asked)[0], store, turns.from_cache), None),
        "cycle": turns.batches,
        "update_policy": turns.updating(lerobot_train.update_policy),
    }
    logging.disable(logging.INFO)
    with mock.patch.multiple(lerobot_train, **replaced), initialised_on(setup.device):
        lerobot_train.train(config)
    return turns


def memory_alone(setup: Setup, way: str) -> tuple[float, ...]:
    """Return the peak memory of a way that has the process for itself."""
    return train_in_turn(setup, (way,), rounds=0).memory[way]


def in_own_processes(setup: Setup) -> dict[str, tuple[float, ...]]:
    """Return the peak memory of each way, each in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn, max_tasks_per_child=1) as pool:
        return {way: pool.submit(memory_alone, setup, way).result() for way in setup.sides}


def record(root: Path, frames: int) -> None:
    """A dataset of one episode, its pictures in videos.

    LeRobot 0.6.1 decodes the pictures of all 50 frames of an action chunk where they are stored as images: the loader
    would be what is measured.
    """
    from lerobot.datasets import LeRobotDataset

    pictures = {key: np.asarray(Image.open(ROOT / "examples" / name)) for key, name in PICTURES.items()}
    names = ["height", "width", "channels"]
    features: dict[str, dict[str, Any]] = {
        key: {"dtype": "video", "shape": picture.shape, "names": names} for key, picture in pictures.items()
    }
    features["observation.state"] = {"dtype": "float32", "shape": (STATE_DIM,), "names": None}
    features["action"] = {"dtype": "float32", "shape": (ACTION_DIM,), "names": None}
    dataset = LeRobotDataset.create(REPO_ID, fps=10, features=features, root=root, use_videos=True)
    generator = np.random.default_rng(0)
    for index in range(frames):
        moved = {key: np.roll(picture, index, axis=1) for key, picture in pictures.items()}
        state, action = (generator.random(size, dtype=np.float32) for size in (STATE_DIM, ACTION_DIM))
        dataset.add_frame({**moved, "observation.state": state, "action": action, "task": "pick up the soup"})
    dataset.save_episode()
    dataset.finalize()


def added_by_cache(setup: Setup, repeats: int = 200) -> dict[str, float]:
    """Median seconds, for a batch, of each thing that the cache adds to a step."""
    store = GeometryStore.open(setup.cache)
    generator = np.random.default_rng(0)
    times = []
    for _ in range(repeats):
        rows = generator.permutation(store.dataset.frames)[: setup.batch_size]
        began = time.perf_counter()
        geometry = {key: torch.from_numpy(array) for key, array in store.batch(rows).to_batch().items()}
        read = time.perf_counter()
        batch = default_collate([{key: maps[i] for key, maps in geometry.items()} for i in range(len(rows))])
        collated = time.perf_counter()
        if setup.device == "cuda":
            for maps in batch.values():
                maps.pin_memory().to("cuda", non_blocking=True)
            torch.cuda.synchronize()
        times.append((read - began, collated - read, time.perf_counter() - collated))
    names = ("worker: read, every checksum checked", "worker: items and batch", "trainer: to the device")
    return dict(zip(names, np.median(times, axis=0).tolist(), strict=True))


def spread(over: Sequence[float], under: Sequence[float]) -> str:
    """Median and quartiles of the ratios of two ways' turns, round by round."""
    low, median, high = np.percentile(np.divide(over, under), (25, 50, 75))
    return f"{median:.3f} (middle half of the rounds {low:.3f} to {high:.3f})"


def report_modes(setup: Setup, turns: Turns, memory: dict[str, tuple[float, ...]]) -> None:
    seconds = {way: turns.seconds[way][1:] for way in setup.sides}
    rows = []
    for way, side in setup.sides.items():
        tokens = 0 if way == PLAIN or MODES.get(way) == "align" else len(PICTURES) * side**2
        sizes = [f"{size:.2f}" if turns.cuda else f"{size:.0f}" for size in memory[way]]
        rows.append([way, str(tokens), f"{np.median(seconds[way]):.4f}", spread(seconds[way], seconds[PLAIN]), *sizes])
    policy = "Pi0.5 in bfloat16" if turns.cuda else f"the small Pi0.5 in {torch.get_num_threads()} thread(s)"
    table(
        f"A training step in each mode: {policy}",
        f"Batches of {setup.batch_size} frames, {len(PICTURES)} cameras of 256x256, maps of 36x36 from the cache. In"
        f" turn, in one run of LeRobot's trainer, {turns.rounds} rounds of {setup.steps} steps after one to warm up."
        f" Medians; (g) is a step that is logged. Memory as in the table of `bench_train.py`.",
        ["", "tokens", "s/step", "over a", *(["GPU, GiB"] if turns.cuda else ["process, MiB", "worker, MiB"])],
        rows,
    )


def report(setup: Setup, turns: Turns, memory: dict[str, tuple[float, ...]]) -> None:
    store = GeometryStore.open(setup.cache)
    spec = store.spec
    seconds = {way: turns.seconds[way][1:] for way in setup.sides}
    medians = {way: float(np.median(seconds[way])) for way in setup.sides}
    rows = []
    for way, side in setup.sides.items():
        fetched = float(np.median(turns.waiting[way][1:]))
        compared = [float(np.median(np.divide(seconds[way], seconds[other]))) for other in (CONSTANT, PLAIN)]
        tokens = 0 if way == PLAIN else len(spec.cameras) * side**2
        sizes = [f"{size:.2f}" if turns.cuda else f"{size:.0f}" for size in memory[way]]
        ratios = [f"{ratio:.3f}" for ratio in compared]
        rows.append([way, str(tokens), f"{medians[way]:.4f}", f"{fetched:.4f}", *ratios, *sizes])
    measured = (
        "Peak memory of the device in the first round, before a later way has allocated anything."
        if turns.cuda
        else "Peak resident memory of each way in a run of its own: its process, and its largest worker."
    )
    policy = "Pi0.5 in bfloat16" if turns.cuda else f"the small Pi0.5 in {torch.get_num_threads()} thread(s)"
    table(
        f"A training step: {policy}, {spec.model_name} at {spec.process_res} px in {spec.compute_dtype}",
        f"Batches of {setup.batch_size} frames, {len(spec.cameras)} cameras of 256x256, cached maps of"
        f" {spec.grid_hw[0]}x{spec.grid_hw[1]}; {setup.num_workers} worker(s) of the loader. In turn, in one run of"
        f" LeRobot's trainer, {turns.rounds} rounds after one to warm up; a turn is {setup.steps} steps, from workers"
        f" that are idle to workers that are idle, and a round's batches are the same. Medians. {measured}",
        [
            "",
            "tokens",
            "s/step",
            "fetching",
            "over b",
            "over a",
            *(["GPU, GiB"] if turns.cuda else ["process, MiB", "worker, MiB"]),
        ],
        rows,
    )
    print(f"c/b: {spread(seconds[CACHED], seconds[CONSTANT])}")
    print(f"d/c: {spread(seconds[ONLINE], seconds[CACHED])}\n")
    parts = added_by_cache(setup)
    table(
        "What the cache adds to a batch",
        "Median of 200 batches of random frames, warm, in one process, as a share of a step of (b). Left out: handing"
        " two more tensors from a worker to the trainer. Workers do their part while the trainer trains, where there"
        " are cores for both.",
        ["", "ms", "of a step"],
        [
            [name, f"{1e3 * part:.2f}", f"{part / medians[CONSTANT]:.3%}"]
            for name, part in (parts | {"together": sum(parts.values())}).items()
        ],
    )


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--da3", type=Path, help="a DA3 folder; it is made with random weights where it does not exist")
    parser.add_argument("--process-res", type=int, default=504 if cuda else 252)
    parser.add_argument("--batch-size", type=int, default=8 if cuda else 2)
    parser.add_argument("--steps", type=int, default=16 if cuda else 4, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5 if cuda else 10)
    parser.add_argument("--num-workers", type=int, default=4 if cuda else 1)
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out: on a CPU it needs more runs")
    parser.add_argument("--target-hw", default="14", metavar="N,N", help="sides of the target grids (%(default)s)")
    parser.add_argument("--modes", action="store_true", help="compare tokens, the alignment loss and both")
    arguments = parser.parse_args()
    preset = "da3-large" if cuda else "da3-small"
    with (
        tempfile.TemporaryDirectory(prefix="bench-train-") as name,
        da3_folder(arguments.da3, preset) as model,
    ):
        folder = Path(name)
        setup = Setup(
            root=folder / "dataset",
            cache=folder / "cache.zarr",
            device="cuda" if cuda else "cpu",
            batch_size=arguments.batch_size,
            steps=arguments.steps,
            num_workers=arguments.num_workers,
            target_sides=tuple(int(side) for side in arguments.target_hw.split(",")),
            modes=arguments.modes,
        )
        record(setup.root, setup.batch_size * setup.steps)
        command = [sys.executable, "-m", "geomcache", "extract", "--model", str(model), "--dataset", REPO_ID]
        command += ["--root", str(setup.root), "--output", str(setup.cache)]
        subprocess.run(
            [*command, f"--grid={GRID}", f"--process-res={arguments.process_res}"],
            check=True,
            stdout=sys.stderr,
        )
        memory = {} if cuda or arguments.no_memory else in_own_processes(setup)
        turns = train_in_turn(setup, tuple(setup.sides), arguments.rounds)
        (report_modes if setup.modes else report)(setup, turns, memory or turns.memory)


if __name__ == "__main__":
    main()
