"""The options of an extraction as a file: what is written beside a cache, and what `--config` makes of a file."""

import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml

from geomcache import geometry
from geomcache.cache.codecs import CodecName
from geomcache.cache.commands import Machine, extract_command, recorded_machines, run_config_path
from geomcache.cache.store import GeometryStore
from geomcache.cli import main as cli
from geomcache.errors import UserInputError
from geomcache.extraction import run as extract
from geomcache.extraction.options import ExtractOptions, recorded_options
from geomcache.extraction.run import ExtractReport
from geomcache.extraction.run_config import read_run_config, resolve, write_run_config
from geomcache.look.info import describe, describe_lines
from geomcache.pipeline.run_file import HEADER, record_machine
from tests.support.cli import call
from tests.support.logs import logged_lines
from tests.support.stores import CAMERAS, make_dataset_spec, make_spec, make_store

CLUSTER = ("cluster", "cluster_address", "actors", "gpus_per_actor")
KNOWN = recorded_options()


def file_of(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text)
    return file


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[ExtractOptions]:
    """Options that `geomcache extract` comes to; nothing is extracted."""
    calls: list[ExtractOptions] = []

    def run(options: ExtractOptions) -> ExtractReport:
        calls.append(options)
        return ExtractReport(path=options.output_path)

    monkeypatch.setattr(extract, "extract", run)
    return calls


def test_values_are_text_as_on_the_command_line(tmp_path: Path) -> None:
    text = "model: DA3-SMALL\nepisodes: 1:30\nrevision: 0123\ncameras: [a, b]\noutputs:\n- ray\nroot: no\n"
    assert read_run_config(file_of(tmp_path, text), KNOWN) == {
        "model": "DA3-SMALL",
        "episodes": "1:30",  # YAML's own reading is 90
        "revision": "0123",
        "cameras": "a,b",
        "outputs": "ray",
        "root": "no",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: x", "did you mean model? expected options of model, dataset,"),
        ("process-res: 3", "did you mean process_res?"),
        ("overwrite: true", "expected options of"),
        ("model: x\nmodel: y", "model: expected once, found twice"),
        ("model:", "model: expected a value or a list of values"),
        ("cameras: []", "cameras: expected a value or a list"),
        ("cameras: [[a]]", "cameras: expected a value or a list"),
        ("model: {a: b}", "model: expected a value or a list"),
        ("[model]", "expected lines such as"),
        ("", "expected lines such as"),
        ("model: [", "expected YAML, found something else"),
        ("[a]: b", "got ''"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = file_of(tmp_path, text)
    with pytest.raises(UserInputError) as caught:
        read_run_config(file, KNOWN)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"config {file}: ")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("none", "binary", "."):
        with pytest.raises(UserInputError, match="expected"):
            read_run_config(tmp_path / name, KNOWN)


def test_the_command_line_comes_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[ExtractOptions]
) -> None:
    file = file_of(
        tmp_path, "model: DA3-BASE\ndataset: o/d\nprocess_res: 112\nviews: independent\noutputs: [ray]\ndtype: fp32\n"
    )
    assert call(monkeypatch, "extract", "--config", file, "--process-res", "504", "--model", "DA3-SMALL") == 0
    # 504 is the default, and stands because it was given.
    assert asked == [
        ExtractOptions(
            model="DA3-SMALL", dataset="o/d", process_res=504, views="independent", outputs=("ray",), dtype="fp32"
        )
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset: x", "Missing option '--model' (other options are from"),
        ("model: a\ndataset: b\nviews: both", "'joint', 'independent' (other options are from"),
        ("model: a\ndataset: b\nbatch_size: many", "batch-size: expected a number of frames, or auto, got 'many'"),
        ("model: a\ndatset: b", "did you mean dataset?"),
        ("model: a\ndataset: b\nhelp: c", "got 'help'"),
        ("model: a\ndataset: b\nconfig: c", "got 'config'"),
        ("model: a\ndataset: b\ndry_run: c", "got 'dry_run'"),
    ],
)
def test_what_a_file_lacks_or_has_wrong_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: list[ExtractOptions],
    text: str,
    message: str,
) -> None:
    assert call(monkeypatch, "extract", "--config", file_of(tmp_path, text)) == cli.EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("geomcache: ")
    assert error.count("\n") == 1
    assert asked == []


def test_the_command_has_the_options_of_the_dataclass_and_those_of_what_it_makes_are_recorded() -> None:
    command = typing.cast("typing.Any", typer.main.get_command(cli.app)).commands["extract"]
    names = {field.name for field in fields(ExtractOptions)}
    assert {option.name for option in command.params} == names | {"config"}
    assert names - set(KNOWN) == {"dry_run", "overwrite", "follow", *CLUSTER}


def test_the_commands_defaults_are_the_dataclasss(monkeypatch: pytest.MonkeyPatch, asked: list[ExtractOptions]) -> None:
    assert call(monkeypatch, "extract", "--model", "m", "--dataset", "d") == 0
    assert asked == [ExtractOptions(model="m", dataset="d")]


def test_every_option_reaches_the_dataclass(monkeypatch: pytest.MonkeyPatch, asked: list[ExtractOptions]) -> None:
    words = [*("--model", "m", "--dataset", "d", "-o", "c.zarr", "--dry-run", "--overwrite"), *("--root", "r")]
    words += [
        "--revision",
        "1",
        "--episodes",
        "0:3",
        "--cameras",
        "b, a",
        "--tolerance-s",
        "0.01",
        "--views",
        "independent",
    ]
    words += [
        "--process-res",
        "28",
        "--grid",
        "2x2",
        "--outputs",
        "ray,depth,feature",
        "--feature-dim",
        "64",
        "--codec",
        "zstd",
        "--dtype",
        "bf16",
    ]
    words += [
        "--model-revision",
        "2",
        "--device",
        "cpu",
        "--batch-size",
        "auto",
        "--num-workers",
        "0",
        "--engine",
        "compiled",
    ]
    assert call(monkeypatch, "extract", *words) == 0
    (options,) = asked
    assert options == ExtractOptions(
        model="m",
        dataset="d",
        output=Path("c.zarr"),
        dry_run=True,
        overwrite=True,
        root=Path("r"),
        revision="1",
        episodes="0:3",
        cameras=("b", "a"),
        tolerance_s=0.01,
        views="independent",
        process_res=28,
        grid="2x2",
        outputs=("ray", "depth", "feature"),
        feature_dim=64,
        codec="zstd",
        dtype="bf16",
        model_revision="2",
        device="cpu",
        batch_size="auto",
        num_workers=0,
        engine="compiled",
    )
    defaults = ExtractOptions(model="", dataset="")
    assert [
        field.name for field in fields(options) if getattr(options, field.name) == getattr(defaults, field.name)
    ] == ["follow", *CLUSTER]  # which some of these do not go with


def test_every_option_of_a_cluster_reaches_the_dataclass(
    monkeypatch: pytest.MonkeyPatch, asked: list[ExtractOptions]
) -> None:
    words = ["--cluster", "ray", "--cluster-address", "head:6379", "--actors", "3", "--gpus-per-actor", "0.5"]
    assert call(monkeypatch, "extract", "--model", "m", "--dataset", "d", *words) == 0
    expected = {"cluster": "ray", "cluster_address": "head:6379", "actors": 3, "gpus_per_actor": 0.5}
    assert {*expected} == {*CLUSTER}
    assert {name: getattr(asked[0], name) for name in CLUSTER} == expected


def test_following_prints_each_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def follow(options: ExtractOptions) -> Iterator[ExtractReport]:
        assert options.follow
        yield ExtractReport(path=tmp_path / "cache.zarr", frames_total=3)
        yield ExtractReport(path=tmp_path / "cache.zarr", frames_total=5)

    monkeypatch.setattr(extract, "follow", follow)
    assert call(monkeypatch, "extract", "--model", "m", "--dataset", "d", "--root", tmp_path, "--follow") == 0
    assert [line.split(", ")[1].split(" ")[0] for line in capsys.readouterr().out.splitlines()] == ["3", "5"]


@pytest.mark.parametrize("text", ["", ",", " , "])
def test_an_empty_list_of_cameras_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: list[ExtractOptions], text: str
) -> None:
    assert call(monkeypatch, "extract", "--model", "m", "--dataset", "d", "--cameras", text) == cli.EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith("geomcache: cameras: ")
    assert error.count("\n") == 1
    assert asked == []


def test_the_choices_are_those_of_the_contract() -> None:
    hints = typing.get_type_hints(ExtractOptions)
    assert hints["views"] == geometry.Views
    assert hints["dtype"] == geometry.ComputeDtype | None
    assert hints["codec"] == CodecName
    assert ExtractOptions(model="", dataset="").outputs == geometry.DEFAULT_OUTPUTS


def test_a_suggested_command_gives_the_caches_options_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[ExtractOptions]
) -> None:
    store = GeometryStore.open(make_store(tmp_path / "cache.zarr"))
    words = shlex.split(extract_command(store, np.array([1]), root="r"))
    assert words[:2] == ["geomcache", "extract"]
    assert call(monkeypatch, *words[1:]) == 0
    spec = store.spec
    assert asked == [
        ExtractOptions(
            model=spec.model_id,
            dataset=store.dataset.repo_id,
            output=store.path,
            root=Path("r"),
            episodes="1",
            cameras=spec.camera_keys,
            views=spec.views,
            process_res=spec.process_res,
            grid=spec.grid,
            outputs=spec.outputs,
            dtype=spec.compute_dtype,
        )
    ]


def test_what_is_written_gives_the_same_options_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[ExtractOptions]
) -> None:
    cache = make_store(tmp_path / "cache.zarr")
    monkeypatch.chdir(tmp_path)
    spec, dataset = make_spec(model_revision="c0ffee"), make_dataset_spec(revision="0123")
    options = ExtractOptions(
        model="DA3-SMALL", dataset="o/d", output=Path("cache.zarr"), episodes="1:30", batch_size=3, overwrite=True
    )
    write_run_config(cache, resolve(options, spec, dataset))
    monkeypatch.chdir("/")
    assert call(monkeypatch, "extract", "--config", tmp_path / "cache.run.yaml") == 0
    resolved = replace(
        options,
        overwrite=False,
        output=cache,
        model_revision="c0ffee",
        revision="0123",
        cameras=CAMERAS,
        process_res=spec.process_res,
        grid=spec.grid,
        dtype="fp32",
    )
    assert asked == [resolved]


def test_local_folders_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ExtractOptions(model="da3", dataset="o/d", root=Path("data"), revision="v1")
    written = resolve(options, make_spec(), make_dataset_spec())
    assert written["model"] == str(tmp_path / "da3")
    assert written["root"] == str(tmp_path / "data")
    assert written["output"] == str(tmp_path / "d.zarr")
    assert written["revision"] == "v1"
    assert {"device", "num_workers", "batch_size", "model_revision", "episodes"}.isdisjoint(written)


def test_the_file_lies_beside_the_cache() -> None:
    assert run_config_path(Path("a/libero.zarr")) == Path("a/libero.run.yaml")
    assert run_config_path(Path("libero.14x14")) == Path("libero.14x14.run.yaml")


def test_a_users_file_stays(tmp_path: Path) -> None:
    cache = make_store(tmp_path / "cache.zarr")
    path = run_config_path(cache)
    path.write_text("# mine\nmodel: a\n")
    with logged_lines() as lines:
        write_run_config(cache, {"model": "b"})
    assert [line.partition(": ")[0] for line in lines] == [str(path)]
    assert path.read_text() == "# mine\nmodel: a\n"


WRITE_OFTEN = """
import sys
from pathlib import Path

from geomcache.extraction.run_config import write_run_config

for _ in range(20):
    write_run_config(Path(sys.argv[1]), {"model": f"m{sys.argv[2]}" * 1000})
"""


def test_jobs_that_write_it_at_the_same_time_leave_one_of_theirs(tmp_path: Path) -> None:
    cache = make_store(tmp_path / "cache.zarr")
    jobs = [subprocess.Popen([sys.executable, "-c", WRITE_OFTEN, str(cache), str(number)]) for number in range(3)]
    assert [job.wait(120) for job in jobs] == [0, 0, 0]
    text = run_config_path(cache).read_text()
    assert text.startswith(HEADER)
    assert yaml.safe_load(text)["model"] in {f"m{number}" * 1000 for number in range(3)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.run.yaml", "cache.zarr"]


def test_what_encoded_a_cache_is_kept_with_its_options(tmp_path: Path) -> None:
    path = make_store(tmp_path / "libero.zarr")
    file = run_config_path(path)
    gpu, compiled = Machine("NVIDIA H200", "eager"), Machine("NVIDIA H200", "compiled")
    record_machine(path, gpu)
    assert not file.exists()  # whoever removed it does not get it back in part
    write_run_config(path, {"model": "DA3-LARGE"})
    for machine in (gpu, compiled, gpu):
        record_machine(path, machine)
    assert set(recorded_machines(path)) == {gpu, compiled}
    assert file.read_text().count("NVIDIA") == 2
    assert read_run_config(file, KNOWN) == {"model": "DA3-LARGE"}
    lines = list(describe_lines(describe(path)))
    assert sum("NVIDIA H200, engine" in line for line in lines) == 2

    write_run_config(path, {"model": "DA3-BASE"})  # a run that resumes
    assert set(recorded_machines(path)) == {gpu, compiled}
    write_run_config(path, {"model": "DA3-BASE"}, is_new=True)
    assert recorded_machines(path) == ()
    file.write_text("model: mine\n")
    record_machine(path, gpu)
    assert file.read_text() == "model: mine\n"
    file.write_bytes(b"\xff")
    assert recorded_machines(path) == ()
