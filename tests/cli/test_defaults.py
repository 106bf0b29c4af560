"""What the commands choose where none is named, and that each choice is said."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from geomcache.cache.commands import run_config_path
from geomcache.cli import defaults
from geomcache.cli import main as cli
from geomcache.errors import CacheNotFoundError, UserInputError
from geomcache.extraction import run as extraction
from geomcache.extraction.options import DEFAULT_DATASET, ExtractOptions
from geomcache.extraction.run_config import write_run_config
from geomcache.pipeline.report import ExtractReport
from tests.support.cli import call
from tests.support.datasets import ROOT
from tests.support.logs import logged_lines
from tests.support.stores import fill, make_dataset_spec, make_store, open_writer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty, on a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


def option(args: list[str], name: str) -> str | None:
    values = [arg.partition("=")[2] for arg in args if arg.startswith(f"--{name}=")]
    assert len(values) < 2
    return values[0] if values else None


# ---- extract ---------------------------------------------------------------------------------------------------------


def test_extract_takes_libero_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[ExtractOptions] = []

    def record(options: ExtractOptions) -> ExtractReport:
        asked.append(options)
        return ExtractReport(path=options.output_path)

    monkeypatch.setattr(extraction, "extract", record)
    assert call(monkeypatch, "extract", "--model", "DA3-LARGE") == 0
    assert asked == [ExtractOptions(model="DA3-LARGE", dataset=DEFAULT_DATASET)]
    assert asked[0].output_path == Path("libero.zarr")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("dataset: ")]
    assert DEFAULT_DATASET in line
    assert "--dataset" in line

    assert call(monkeypatch, "extract", "--model", "DA3-LARGE", "--dataset", "me/pens") == 0
    assert asked[1].dataset == "me/pens"
    assert "dataset: " not in capsys.readouterr().out


def test_the_dataset_of_a_folder_needs_a_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "extract", "--model", "DA3-LARGE", "--root", "pens") == cli.EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith("geomcache: dataset: ")
    assert "pens" in error
    assert error.count("\n") == 1


# ---- train: the cache ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [True, False])
def test_the_only_cache_of_the_folder_is_taken(folder: Path, *, sealed: bool) -> None:
    if sealed:
        make_store(folder / "pens.zarr")
    else:
        with open_writer(folder / "pens.zarr") as writer:
            fill(writer, shards=1)
    make_store(folder / "deeper" / "other.zarr")
    (folder / "notes").mkdir()
    (folder / "arrays.zarr").mkdir()
    (folder / "arrays.zarr" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    make_store(folder / "pens.draft").rename(folder / ".pens.zarr.0123.draft")
    with logged_lines() as lines:
        assert defaults.choose_cache(Path()) == Path("pens.zarr")
    (line,) = lines
    assert "pens.zarr" in line
    assert "--cache" in line


def test_none_and_several_caches_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CacheNotFoundError, match="--cache"):
        defaults.choose_cache(Path())
    make_store(folder / "pens.zarr")
    make_store(folder / "cups.zarr")
    assert call(monkeypatch, "train") == cli.EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert "cups.zarr, pens.zarr" in error
    assert "--cache" in error
    assert error.count("\n") == 1


# ---- train: the other options ----------------------------------------------------------------------------------------


@dataclass
class Chosen:
    args: list[str]
    lines: list[str]


def choose(cache: Path, *args: str) -> Chosen:
    with logged_lines() as lines:
        chosen = defaults.with_training_choices(cache, args)
    assert chosen[: len(args)] == list(args)
    return Chosen(args=chosen[len(args) :], lines=list(lines))


@pytest.mark.parametrize(
    ("repo_id", "policy"),
    [
        ("HuggingFaceVLA/libero", "lerobot/pi05_libero_base"),
        ("me/LIBERO_10_image", "lerobot/pi05_libero_base"),
        ("libero/pens", "lerobot/pi05_base"),
    ],
)
def test_what_is_left_open_follows_from_the_cache(folder: Path, repo_id: str, policy: str) -> None:
    cache = make_store(folder / "c.zarr", dataset=make_dataset_spec(repo_id=repo_id, revision=COMMIT))
    chosen = choose(cache)
    assert chosen.args == [
        f"--dataset.repo_id={repo_id}",
        f"--dataset.revision={COMMIT}",
        f"--policy.path={policy}",
        "--output_dir=outputs/pi05_geometry",
    ]
    assert [line.partition(":")[0] for line in chosen.lines] == ["dataset", "policy", "output"]
    said = zip(chosen.lines, ("dataset.repo_id", "policy.path", "output_dir"), strict=True)
    assert all(f"--{name}" in line for line, name in said)


def test_a_dataset_in_a_folder_is_found_through_the_file_next_to_the_cache(folder: Path) -> None:
    cache = make_store(folder / "c.zarr")
    write_run_config(cache, {"model": "m", "dataset": "tests/made-up", "root": "/data/pens"})
    assert choose(cache).args[:2] == ["--dataset.repo_id=tests/made-up", "--dataset.root=/data/pens"]
    run_config_path(cache).write_text("root: /of/the/user\n")
    assert option(choose(cache).args, "dataset.root") is None


def test_time_stamps_are_read_as_the_cache_was_made(folder: Path) -> None:
    cache = make_store(folder / "c.zarr")
    recorded = {"model": "m", "dataset": "tests/made-up", "tolerance_s": 0.01}
    write_run_config(cache, recorded)
    assert option(choose(cache).args, "tolerance_s") == "0.01"
    assert option(choose(cache, "--tolerance_s=0.5").args, "tolerance_s") is None
    write_run_config(cache, recorded | {"tolerance_s": 1e-4})  # LeRobot's default
    assert option(choose(cache).args, "tolerance_s") is None


def test_what_is_given_is_kept(folder: Path) -> None:
    cache = make_store(folder / "libero.zarr", dataset=make_dataset_spec(revision=COMMIT))
    given = ["--dataset.repo_id=me/libero", "--policy.pretrained_path=p", "--output_dir=o"]
    assert choose(cache, *given) == Chosen(args=[], lines=[])
    assert choose(cache, "--config_path=train_config.json", "--resume=true") == Chosen(args=[], lines=[])
    args = choose(cache, "--dataset.root=here").args
    assert option(args, "dataset.repo_id") == "tests/made-up"
    assert option(args, "dataset.root") is option(args, "dataset.revision") is None
    assert option(choose(cache, "--dataset.revision=v1").args, "dataset.revision") is None
    for policy in ("path=p", "pretrained_path=p", "type=pi05_geometry", "model_size=small", "random_init=true"):
        assert option(choose(cache, f"--policy.{policy}").args, "policy.path") is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ("bfloat16", "true")),
        (["--policy.pretrained_path=p"], ("bfloat16", "true")),
        (["--policy.device=cuda:1"], ("bfloat16", "true")),
        (["--policy.dtype=float32"], (None, "true")),
        (["--policy.gradient_checkpointing=false"], ("bfloat16", None)),
        (["--policy.device=cpu"], (None, None)),
        (["--policy.model_size=small"], (None, None)),
        (["--policy.path=p"], (None, None)),  # the checkpoint's own
        (["--policy.type=pi0_geometry"], ("bfloat16", "true")),
        (["--policy.type=smolvla_geometry"], (None, None)),  # it has no such options
    ],
)
def test_the_full_model_fits_a_gpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], expected: tuple[str | None, str | None]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen = choose(make_store(folder / "c.zarr"), *given)
    options = tuple(option(chosen.args, f"policy.{name}") for name in ("dtype", "gradient_checkpointing"))
    assert options == expected
    assert sum(line.startswith(("dtype: ", "gradient_checkpointing: ")) for line in chosen.lines) == 2 - options.count(
        None
    )


def test_a_run_that_exists_is_resumed_and_not_overwritten(folder: Path) -> None:
    cache = make_store(folder / "c.zarr")
    checkpoints = folder / "outputs" / "pi05_geometry" / "checkpoints"
    (checkpoints / "000007" / "training_state").mkdir(parents=True)
    (checkpoints / "last").symlink_to("000007")
    with pytest.raises(UserInputError) as caught:
        choose(cache)
    message = str(caught.value)
    assert message.startswith("output_dir: ")
    assert "from step 7" in message
    assert "--config_path=outputs/pi05_geometry/checkpoints/last/pretrained_model/train_config.json" in message
    assert "--output_dir" in message


def test_other_processes_of_a_run_choose_in_silence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_store(folder / "c.zarr")
    first = choose(cache)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert choose(cache) == Chosen(args=first.args, lines=[])


# ---- eval-libero -----------------------------------------------------------------------------------------------------


def evaluate(folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of the script in `folder`, with a geomcache that prints its arguments."""
    for name in ("pipelines", "bin"):
        (folder / name).mkdir(exist_ok=True)
    script = folder / "pipelines" / "eval_libero.sh"
    script.write_bytes((ROOT / "pipelines" / "eval_libero.sh").read_bytes())
    program = folder / "bin" / "geomcache"
    program.write_text('#!/bin/sh\necho "geomcache $*"\n')
    program.chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(script)],
        env={"PATH": path, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_newest_checkpoint_is_evaluated(tmp_path: Path) -> None:
    times = {"pi05_geometry": 1_000, "other/deeper run": 2_000, "older": 500}
    for name, seconds in times.items():
        checkpoints = tmp_path / "outputs" / name / "checkpoints"
        for step in ("000002", "000004"):
            (checkpoints / step / "pretrained_model").mkdir(parents=True)
        (checkpoints / "last").symlink_to("000002")  # 000004 is being written
        os.utime(checkpoints / "last", (seconds, seconds), follow_symlinks=False)
    newest = "outputs/other/deeper run/checkpoints/000002/pretrained_model"
    done = evaluate(tmp_path)
    assert done.returncode == 0, done.stderr
    line, command = done.stdout.splitlines()
    assert newest in line
    assert "POLICY=" in line
    assert command.startswith(f"geomcache eval --policy {newest} --env.type=libero --env.task=libero_10 ")

    done = evaluate(tmp_path, POLICY="mine", SUITE="libero_goal")
    assert done.stdout.startswith("geomcache eval --policy mine --env.type=libero --env.task=libero_goal ")


def test_without_a_checkpoint_one_line_says_how_to_get_one(tmp_path: Path) -> None:
    done = evaluate(tmp_path)
    assert done.returncode == cli.EXIT_USER_ERROR
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "POLICY=" in done.stderr
