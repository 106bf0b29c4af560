"""Test the command line: what it prints, its exit codes, and that asking for help costs nothing."""

import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import typer
from PIL import Image

from geomcache.cli import help as cli_help
from geomcache.cli import main as cli
from tests.support.cli import call
from tests.support.datasets import DEMO
from tests.support.stores import make_store

START = "import sys; sys.argv[0] = 'geomcache'; from geomcache.cli.main import main; main()"
HEAVY = ("torch", "zarr", "numpy", "lerobot", "depth_anything_3", "transformers", "av")


@pytest.fixture(scope="module")
def sealed_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("cli") / "cache.zarr")


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['geomcache', '--help']\n"
        "from geomcache.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    for command in ("extract", "info", "probe"):
        assert command in done.stdout


def test_without_arguments_the_help_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch) == cli.EXIT_USER_ERROR
    printed = capsys.readouterr()
    assert "Usage: geomcache" in printed.out
    assert printed.err == ""


def commands() -> dict[str, typing.Any]:
    group = typing.cast("typing.Any", typer.main.get_command(cli.app))
    return dict(group.commands)


@pytest.mark.parametrize("name", sorted(commands()))
def test_help_shows_an_example_and_fits_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    command = commands()[name]
    assert command.rich_help_panel in (cli_help.STAGES, cli_help.CACHES, cli_help.MODELS, cli_help.POLICIES)
    monkeypatch.setenv("COLUMNS", "80")
    assert call(monkeypatch, name, "--help") == 0
    shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith(f"geomcache {name} ") for line in shown)
    for line in command.epilog.splitlines():  # a command that is wrapped cannot be copied
        if line.startswith(" "):
            assert line.strip().replace("\\[", "[").replace("\\\\", "\\") in shown, line


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_get_a_completion_script_and_its_answers(shell: str) -> None:
    script = subprocess.run(
        [sys.executable, "-c", START],
        env=os.environ | {"_GEOMCACHE_COMPLETE": f"source_{shell}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"_GEOMCACHE_COMPLETE=complete_{shell}" in script
    typed = {"COMP_WORDS": "geomcache extract --proc", "COMP_CWORD": "2"}
    typed |= {"_TYPER_COMPLETE_ARGS": "geomcache extract --proc", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    answer = subprocess.run(
        [sys.executable, "-c", START],
        env=os.environ | typed | {"_GEOMCACHE_COMPLETE": f"complete_{shell}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "--process-res" in answer.stdout
    assert answer.stderr == ""


def test_no_escape_codes_where_there_is_no_terminal(sealed_cache: Path) -> None:
    for arguments in (["--help"], ["extract", "--help"], ["extrakt"], ["info", sealed_cache], ["verify", sealed_cache]):
        done = subprocess.run(
            [sys.executable, "-c", START, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert "\x1b" not in done.stdout + done.stderr, arguments


@pytest.mark.parametrize("command", ["info", "verify"])
def test_json_is_all_of_standard_output(sealed_cache: Path, command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", START, command, str(sealed_cache), "--json"], capture_output=True, text=True, check=True
    )
    assert isinstance(json.loads(done.stdout), dict)


def test_extract_info_and_a_mistake(
    random_da3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "demo.zarr"
    arguments = ["extract", "--model", random_da3_folder, "--dataset", "geomcache/demo", "--root", DEMO]
    arguments += [
        "--output",
        path,
        "--process-res",
        "28",
        "--episodes",
        "1",
        "--num-workers",
        "0",
        "--batch-size",
        "32",
    ]
    assert call(monkeypatch, *arguments) == 0
    out = capsys.readouterr().out
    assert "views/s" in out
    assert call(monkeypatch, "info", path) == 0
    out = capsys.readouterr().out
    for part in ("sealed", "da3-small", "geomcache/demo: 380 frames, 3 episodes, 10 fps", "2x2 (patch at 28 px)"):
        assert part in out
    assert "1 present; 0,2 missing" in out
    assert call(monkeypatch, "info", path, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["episodes_present"] == [[1, 2]]
    assert facts["spec"]["grid_hw"] == [2, 2]
    assert call(monkeypatch, *arguments, "--cameras", "observation.images.image") == cli.EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert message.startswith("geomcache: ")
    assert "spec.cameras" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--model", "DA3-LARG", "--dataset", "x", "--root", DEMO], "DA3-LARGE"),
        (["--model", "DA3MONO-LARGE", "--dataset", "x", "--root", DEMO], "ray"),
        (["--model", "/nowhere/at/all", "--dataset", "x", "--root", DEMO], "/nowhere/at/all"),
        (["--model", "DA3-SMALL", "--dataset", "x", "--root", "/nowhere"], "meta/info.json"),
        (["--model", "DA3-SMALL", "--dataset", "x", "--root", DEMO, "--cameras", "front"], "observation.images.image2"),
        (["--model", "DA3-SMALL", "--dataset", "x", "--root", DEMO, "--episodes", "2:9"], "0:3"),
        (["--model", "DA3-SMALL", "--dataset", "x", "--root", DEMO, "--outputs", "rays"], "outputs"),
        (["--model", "DA3-SMALL", "--dataset", "x", "--root", DEMO, "--grid", "14"], "grid"),
        (["--model", "DA3-SMALL", "--dataset", "x", "--root", DEMO, "--process-res", "3"], "process-res"),
        (["--model", "DA3-SMALL", "--dataset", "x", "--root", DEMO, "--batch-size", "0"], "batch-size"),
        (["--model", "DA3-SMALL", "--dataset", "x", "--root", DEMO, "--device", "tpu"], "device"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    part: str,
) -> None:
    code = call(monkeypatch, "extract", "--output", tmp_path / "cache.zarr", *arguments)
    message = capsys.readouterr().err
    assert code == cli.EXIT_USER_ERROR, message
    assert part in message
    assert message.startswith("geomcache: ")
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["extrakt"], ("extrakt", "extract", "geomcache --help")),
        (["extract", "--views", "both"], ("--views", "both", "joint", "independent")),
        (["extract", "--gird", "x"], ("--gird", "--grid", "geomcache extract --help")),
        (["extract", "--dataset", "x"], ("--model", "geomcache extract --help")),
        (["info"], ("PATH", "geomcache info --help")),
        (["info", "--config", "x.yaml", "p"], ("--config", "geomcache info --help")),
    ],
)
def test_a_wrong_call_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], values: tuple[str, ...]
) -> None:
    assert call(monkeypatch, *arguments) == cli.EXIT_USER_ERROR
    message = capsys.readouterr().err
    for value in values:
        assert value in message
    assert message.startswith("geomcache: ")
    assert message.count("\n") == 1


@pytest.mark.parametrize("output", ["file.txt/cache.zarr", "file.txt"])
def test_an_output_that_cannot_be_is_refused(
    random_da3_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    output: str,
) -> None:
    (tmp_path / "file.txt").write_text("mine")
    arguments = ["extract", "--model", random_da3_folder, "--dataset", "x", "--root", DEMO, "--process-res", "28"]
    assert call(monkeypatch, *arguments, "--output", tmp_path / output) == cli.EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert "file.txt" in message
    assert message.count("\n") == 1
    assert (tmp_path / "file.txt").read_text() == "mine"


def test_a_path_that_is_no_cache_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "info", tmp_path / "none.zarr") == cli.EXIT_USER_ERROR
    assert call(monkeypatch, "info", tmp_path) == cli.EXIT_USER_ERROR
    assert capsys.readouterr().err.count("\n") == 2


def test_probe_prints_and_saves_a_picture(
    random_da3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [DEMO.parent / name for name in ("front.png", "wrist.png")]
    arguments = ["probe", "--model", random_da3_folder, "--process-res", "56", "--output", tmp_path]
    assert call(monkeypatch, *arguments, "--image", images[0], "--image", images[1]) == 0
    out = capsys.readouterr().out
    for name in ("depth", "depth_conf", "ray", "ray_conf"):
        assert name in out
    (picture,) = tmp_path.glob("*.png")
    with Image.open(picture) as image:
        assert image.width > 256
