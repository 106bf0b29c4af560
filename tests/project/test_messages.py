"""What users read after their most frequent mistakes: the one place in the suite that holds the wording of messages.

Each mistake runs through the real command line, in this process; messages.txt next to this file has the lines that it
printed when somebody last read them. After a change of wording, write the file again and read its diff as a user would:

    UPDATE_MESSAGES=1 python -m pytest tests/project/test_messages.py -p no:xdist
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from geomcache.cli import main as cli
from geomcache.evaluation.episodes import EpisodeLog
from geomcache.geometry import Camera
from tests.support.cli import call
from tests.support.datasets import DEMO
from tests.support.results import make_identity, make_row
from tests.support.stores import fill, make_dataset_spec, make_spec, make_store, open_writer

MESSAGES = Path(__file__).with_name("messages.txt")
LEROBOT = ("train", "eval")
UPDATE = bool(os.environ.get("UPDATE_MESSAGES"))
EXTRACT = "extract --dataset geomcache/demo --root DEMO --output TMP/new.zarr"
TRAIN = (
    "--dataset.repo_id=geomcache/demo --dataset.root=DEMO --policy.device=cpu --policy.random_init=true"
    " --policy.geom_target_hw=[1,1] --output_dir=TMP/run"
)


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A command that cannot work, with DEMO and TMP for folders."""

    what: str
    command: str
    prepare: Callable[[Path], object] = lambda _folder: None
    """Makes what the command finds in TMP."""


def sealed(folder: Path) -> Path:
    return make_store(folder / "cache.zarr")


def incomplete(folder: Path) -> None:
    with open_writer(folder / "cache.zarr") as writer:
        fill(writer, shards=2)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def damaged_map(folder: Path) -> None:
    flip(sealed(folder) / "observation.images.front" / "ray" / "c.1.0.0.0", 5)


def damaged_manifest(folder: Path) -> None:
    flip(sealed(folder) / "manifest.json", 40)


def missing_shard(folder: Path) -> None:
    (sealed(folder) / "observation.images.front" / "ray" / "c.1.0.0.0").unlink()


def newer_version(folder: Path) -> None:
    path = sealed(folder) / "zarr.json"
    attributes = json.loads(path.read_text())
    attributes["attributes"]["geomcache"]["schema_version"] = 99
    path.write_text(json.dumps(attributes))


def other_zarr(folder: Path) -> None:
    (folder / "cache.zarr").mkdir()
    (folder / "cache.zarr" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')


def old_dataset(folder: Path) -> None:
    (folder / "old" / "meta").mkdir(parents=True)
    info = json.loads((DEMO / "meta" / "info.json").read_text()) | {"codebase_version": "v2.1"}
    (folder / "old" / "meta" / "info.json").write_text(json.dumps(info))


def dataset_without_videos(folder: Path) -> None:
    shutil.copytree(DEMO, folder / "part", ignore=shutil.ignore_patterns("*.mp4"))


def pickled_model(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_name": "da3-small"}')
    (folder / "model" / "pytorch_model.bin").write_bytes(b"")


def unknown_option_file(folder: Path) -> None:
    (folder / "run.yaml").write_text("model: DA3-SMALL\ndataset: geomcache/demo\nproces_res: 112\n")


def cache_of_three_episodes(folder: Path) -> None:
    make_store(folder / "cache.zarr", [(0, 50)])


def cache_of_other_episodes(folder: Path) -> None:
    info = json.loads((DEMO / "meta" / "info.json").read_text())
    keys = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    cameras = tuple(Camera(key=key, height=256, width=256) for key in keys)
    lengths = (info["total_frames"] - 2, 1, 1)
    spec = dataclasses.replace(make_spec(grid_hw=(1, 1)), cameras=cameras)
    make_store(folder / "cache.zarr", spec=spec, lengths=lengths, dataset=make_dataset_spec(lengths))


def unfinished_results(folder: Path) -> None:
    for name, tasks in (("whole", 3), ("part", 1)):
        with EpisodeLog(folder / f"{name}.csv", make_identity()) as log:
            log.append([make_row(task) for task in range(tasks)])


MISTAKES = [
    # Calls that cannot be parsed
    Mistake("an unknown command", "extrakt"),
    Mistake("an option that is missing", "extract --dataset x"),
    Mistake("a misspelled option", "extract --gird 14x14"),
    Mistake("a word where one of two is expected", "extract --views both"),
    Mistake("text where a number is expected", "extract --process-res large"),
    Mistake("a path that is missing", "info"),
    Mistake("an option of another command", "verify TMP/cache.zarr --device cpu", sealed),
    # The model
    Mistake("a misspelled model", f"{EXTRACT} --model DA3-LARG"),
    Mistake("a model without rays", f"{EXTRACT} --model DA3MONO-LARGE"),
    Mistake("a model folder that is missing", f"{EXTRACT} --model /nowhere/da3"),
    Mistake("a model that is not here, without the Hub", f"{EXTRACT} --model DA3-SMALL"),
    Mistake("pickled weights", f"{EXTRACT} --model TMP/model", pickled_model),
    # The dataset
    Mistake("a dataset folder that is missing", "extract --model DA3-SMALL --dataset x --root /nowhere"),
    Mistake("a dataset of LeRobot's old format", "extract --model DA3-SMALL --dataset x --root TMP/old", old_dataset),
    Mistake(
        "a dataset without its videos", "extract --model DA3-SMALL --dataset x --root TMP/part", dataset_without_videos
    ),
    Mistake("a misspelled camera", f"{EXTRACT} --model DA3-SMALL --cameras observation.images.imag2"),
    Mistake("an unknown camera", f"{EXTRACT} --model DA3-SMALL --cameras front"),
    Mistake("episodes that the dataset lacks", f"{EXTRACT} --model DA3-SMALL --episodes 2:9"),
    Mistake("episodes that are no numbers", f"{EXTRACT} --model DA3-SMALL --episodes all"),
    # Other options of extract
    Mistake("an unknown output", f"{EXTRACT} --model DA3-SMALL --outputs rays"),
    Mistake("a grid of one number", f"{EXTRACT} --model DA3-SMALL --grid 14"),
    Mistake("pictures too small for a patch", f"{EXTRACT} --model DA3-SMALL --process-res 3"),
    Mistake("a batch of none", f"{EXTRACT} --model DA3-SMALL --batch-size 0"),
    Mistake("a batch that is no number", f"{EXTRACT} --model DA3-SMALL --batch-size many"),
    Mistake("an unknown device", f"{EXTRACT} --model DA3-SMALL --device tpu"),
    Mistake("a key that no option has, in a file", "extract --config TMP/run.yaml", unknown_option_file),
    Mistake("a file of options that is missing", "extract --config TMP/none.yaml"),
    # Caches
    Mistake("a cache that is missing", "info TMP/none.zarr"),
    Mistake("a folder that is no cache", "info DEMO"),
    Mistake("a Zarr group of somebody else", "info TMP/cache.zarr", other_zarr),
    Mistake("a cache of a newer version", "info TMP/cache.zarr", newer_version),
    Mistake("a damaged manifest", "info TMP/cache.zarr", damaged_manifest),
    Mistake("a damaged map", "verify TMP/cache.zarr", damaged_map),
    Mistake("a shard that is missing", "verify TMP/cache.zarr", missing_shard),
    Mistake("a frame that was not extracted", "view TMP/cache.zarr --episode 3 --frame 0", cache_of_three_episodes),
    Mistake("an episode that the dataset lacks", "view TMP/cache.zarr --episode 9 --frame 0", sealed),
    # Updates
    Mistake("updating a cache that is missing", "update TMP/none.zarr"),
    Mistake("updating with a dataset of other cameras", "update TMP/cache.zarr --dataset x --root DEMO", sealed),
    Mistake("following a dataset of the Hub", "extract --model DA3-SMALL --dataset x --follow"),
    Mistake("an option of a cluster without one", "extract --model DA3-SMALL --dataset x --actors 2"),
    Mistake("a dry run on a cluster", "extract --model DA3-SMALL --dataset x --cluster ray --dry-run"),
    # Caches at an address
    Mistake("making a cache on the Hub", "extract --model DA3-SMALL --dataset x --output hf://datasets/me/cache"),
    Mistake("following into a bucket", f"{EXTRACT} --model DA3-SMALL --follow --output s3://bucket/cache.zarr"),
    Mistake("repairing a cache at an address", "verify s3://bucket/cache.zarr --repair"),
    Mistake("an address without a cache", "info file://TMP/none.zarr"),
    Mistake("a bound for a local cache", f"train --cache TMP/cache.zarr --cache-disk 5GB {TRAIN}", sealed),
    Mistake("a bound that is no size", f"train --cache file://TMP/cache.zarr --cache-disk much {TRAIN}", sealed),
    Mistake("a bound below a shard", f"train --cache file://TMP/cache.zarr --cache-disk 1kB {TRAIN}", sealed),
    # Training and evaluation
    Mistake("training from a cache that is missing", f"train --cache TMP/none.zarr {TRAIN}"),
    Mistake("training from an incomplete cache", f"train --cache TMP/cache.zarr {TRAIN}", incomplete),
    Mistake("training with other cameras", f"train --cache TMP/cache.zarr {TRAIN}", sealed),
    Mistake("training on other episodes", f"train --cache TMP/cache.zarr {TRAIN}", cache_of_other_episodes),
    Mistake("a checkpoint that is missing", "eval --policy TMP/none --env.task=libero_10"),
    Mistake("a server for other machines without TLS", "serve --policy TMP/none --host 0.0.0.0"),
    Mistake("a server of a checkpoint that is missing", "serve --policy TMP/none --port 0"),
    Mistake("comparing one run", "compare TMP/none.csv"),
    Mistake("results that are missing", "compare TMP/none.csv TMP/none.csv"),
    Mistake("comparing with an unfinished run", "compare TMP/whole.csv TMP/part.csv", unfinished_results),
    # Sharing
    Mistake("pushing an incomplete cache", "push TMP/cache.zarr file://TMP/copy.zarr", incomplete),
    Mistake("pulling what is missing", "pull file://TMP/none.zarr TMP/copy.zarr"),
    Mistake("an address of an unknown kind", "pull gopher://host/cache.zarr TMP/copy.zarr"),
    Mistake("the Hub while it is switched off", "pull hf://datasets/me/cache TMP/copy.zarr"),
]


def said(mistake: Mistake, folder: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command: the command, what it printed to standard error, and its exit code."""
    mistake.prepare(folder)
    words = mistake.command.replace("TMP", str(folder)).replace("DEMO", str(DEMO)).split()
    capsys.readouterr()
    code = call(patch, *words)
    out, err = capsys.readouterr()
    report = out if code == cli.EXIT_DAMAGE else ""  # verify's list of what is damaged
    if words[0] in LEROBOT:  # it logs to standard error, before the message
        err = err.splitlines()[-1]
    text = f"{report}{err}".replace(str(folder), "TMP").replace(str(DEMO), "DEMO")
    text = re.sub(r"\b\d+(\.\d+)? (ms|s)\b", "N s", text)
    return f"$ geomcache {mistake.command}\n{text.rstrip()}\n[exit code {code}]\n"


def kept() -> dict[str, str]:
    """Read the file: command, lines and exit code of each mistake."""
    parts = re.split(r"^# (.+)\n", MESSAGES.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {what: text.strip() + "\n" for what, text in zip(parts[1::2], parts[2::2], strict=True)}


@pytest.mark.skipif(UPDATE, reason="the file is being written")
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_a_mistake_says_what_to_do(
    mistake: Mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(mistake, tmp_path, monkeypatch, capsys)
    assert text == kept()[mistake.what]
    _, *lines, code = text.splitlines()
    if code == "[exit code 2]":
        assert [line.startswith("geomcache: ") for line in lines] == [True]  # one line
    else:
        assert code == "[exit code 1]"
    assert "Traceback" not in text


@pytest.mark.skipif(UPDATE, reason="the file is being written")
def test_the_file_has_these_mistakes_and_no_others() -> None:
    assert list(kept()) == [mistake.what for mistake in MISTAKES]


if UPDATE:

    def test_write_the_file(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        texts = []
        for number, mistake in enumerate(MISTAKES):
            folder = tmp_path / str(number)
            folder.mkdir()
            texts.append(f"# {mistake.what}\n{said(mistake, folder, monkeypatch, capsys)}")
        MESSAGES.write_text("\n".join(texts), encoding="utf-8")
