"""The command line: parse the options, call a room, and turn errors into one line.

Heavy imports stay inside the commands, so that `geomcache --help` answers at once.
"""

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, NoReturn

import typer
from typer.exceptions import TyperException

from geomcache.cli import help as cli_help
from geomcache.cli import look as cli_look
from geomcache.cli import share as cli_share
from geomcache.errors import GeomcacheError, UserInputError

EXIT_DAMAGE = 1
EXIT_USER_ERROR = 2
EXIT_SIGNAL = 128  # plus the signal's number, as a shell reports it

DEVICE_HELP, DEVICE_DEFAULT = "Such as cuda:1 or cpu.", "the GPU where there is one"
DATASET_PANEL = "Dataset: which part of it, and where it is"
GEOMETRY_PANEL = "Geometry: what the cache's numbers depend on"
MACHINE_PANEL = "Machine: the numbers do not depend on these"
NOT_KEPT = {"config", "dry_run", "overwrite", "help"}  # options of extract that a --config file cannot have
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    name="geomcache",
    help="Depth Anything 3 geometry, computed once, cached in Zarr, and given to Pi0.5 as prefix tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"geomcache {version('geomcache')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options before the command."""


def _read_config(context: typer.Context, file: Path | None) -> Path | None:
    """Options of a file take the defaults' place, before the others are parsed; the command line comes first."""
    if file is not None:
        from geomcache.extraction.run_config import read_run_config

        known = [str(option.name) for option in context.command.params if option.name not in NOT_KEPT]
        context.default_map = dict(read_run_config(file, known))
    return file


@app.command(epilog=cli_help.EXTRACT, rich_help_panel=cli_help.STAGES)
def extract(
    model: Annotated[str, typer.Option(help="A DA3 name such as DA3-LARGE, a Hub id, or a folder.")],
    dataset: Annotated[str, typer.Option(help="A LeRobotDataset on the Hub; with --root, the name of that folder.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The cache.", show_default="the dataset's name + .zarr")
    ] = None,
    config: Annotated[  # noqa: ARG001 - its callback reads it
        Path | None,
        typer.Option(
            help="Options out of a file, such as the .run.yaml beside a cache; those given here come first.",
            metavar="FILE",
            callback=_read_config,
            is_eager=True,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print frames, bytes and time, write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the cache that is there.")] = False,
    root: Annotated[
        Path | None,
        typer.Option(help="The dataset's folder, where it is local.", metavar="DIR", rich_help_panel=DATASET_PANEL),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="The dataset's branch, tag or commit.", metavar="REV", rich_help_panel=DATASET_PANEL),
    ] = None,
    episodes: Annotated[
        str | None, typer.Option(help="Such as 0:100 or 0,3,5:8.", show_default="all", rich_help_panel=DATASET_PANEL)
    ] = None,
    cameras: Annotated[
        str | None,
        typer.Option(
            help="Keys in the order of the views; the first is the reference.",
            show_default="all",
            rich_help_panel=DATASET_PANEL,
        ),
    ] = None,
    views: Annotated[
        Literal["joint", "independent"],
        typer.Option(
            help="A frame's cameras as views of one scene, or each camera alone.", rich_help_panel=GEOMETRY_PANEL
        ),
    ] = "joint",
    process_res: Annotated[
        int, typer.Option(help="Longest side of what the network sees, pixels.", rich_help_panel=GEOMETRY_PANEL)
    ] = 504,
    grid: Annotated[
        str, typer.Option(help="patch, native, or cells such as 14x14.", rich_help_panel=GEOMETRY_PANEL)
    ] = "patch",
    outputs: Annotated[
        str, typer.Option(help="Any of ray, ray_conf, depth, depth_conf.", rich_help_panel=GEOMETRY_PANEL)
    ] = "ray,ray_conf",
    codec: Annotated[
        Literal["raw", "zstd"],
        typer.Option(
            help="How maps are stored. zstd: the same numbers in fewer bytes, slower to read.",
            rich_help_panel=GEOMETRY_PANEL,
        ),
    ] = "raw",
    dtype: Annotated[
        Literal["bf16", "fp32"] | None,
        typer.Option(
            help="Of the backbone.", show_default="bf16 on CUDA, fp32 elsewhere", rich_help_panel=GEOMETRY_PANEL
        ),
    ] = None,
    model_revision: Annotated[
        str | None,
        typer.Option(help="The model's branch, tag or commit.", metavar="REV", rich_help_panel=GEOMETRY_PANEL),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help=DEVICE_HELP, show_default=DEVICE_DEFAULT, rich_help_panel=MACHINE_PANEL)
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            help="Frames a forward, or auto: as many as fit and help.",
            metavar="N|auto",
            show_default="16 on a GPU, 4 on a CPU",
            rich_help_panel=MACHINE_PANEL,
        ),
    ] = None,
    num_workers: Annotated[
        int | None,
        typer.Option(
            help="Decoding processes.", show_default="the spare cores, up to 8", rich_help_panel=MACHINE_PANEL
        ),
    ] = None,
) -> None:
    """Run DA3 once over every frame of a dataset and write a cache. The same command again continues."""
    from geomcache.extraction.options import ExtractOptions
    from geomcache.extraction.run import extract as run

    report = run(
        ExtractOptions(
            model=model,
            dataset=dataset,
            root=root,
            revision=revision,
            model_revision=model_revision,
            output=output,
            episodes=episodes,
            cameras=_split(cameras),
            views=views,
            process_res=process_res,
            grid=grid,
            outputs=_split(outputs) or (),
            codec=codec,
            batch_size=_batch_size(batch_size),
            num_workers=num_workers,
            device=device,
            dtype=dtype,
            dry_run=dry_run,
            overwrite=overwrite,
        ),
        say=typer.echo,
    )
    if not dry_run:
        for line in report.lines():
            typer.echo(line)


@app.command(epilog=cli_help.INFO, rich_help_panel=cli_help.CACHES)
def info(
    path: Annotated[Path, typer.Argument(help="A cache.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """Print what is in a cache: model, dataset, grid, bytes, episodes, statistics."""
    import json

    from geomcache.cache.info import describe, describe_lines

    facts = describe(path)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        for line in describe_lines(facts):
            typer.echo(line)


@app.command(epilog=cli_help.PROBE, rich_help_panel=cli_help.MODELS)
def probe(
    model: Annotated[str, typer.Option(help="A DA3 name such as DA3-LARGE, a Hub id, or a folder.")],
    image: Annotated[
        list[Path], typer.Option(help="A picture; several are views of one scene, the first the reference.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the picture.", metavar="DIR")] = Path("outputs/probe"),
    process_res: Annotated[int, typer.Option(help="Longest side of what the network sees, pixels.")] = 504,
    grid: Annotated[str, typer.Option(help="patch, native, or cells such as 14x14.")] = "patch",
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP, show_default=DEVICE_DEFAULT)] = None,
) -> None:
    """Run DA3 on pictures: print shapes and ranges, save what it sees. A check that a model loads and works."""
    from geomcache.look.probe import probe as run

    for line in run(model, image, output, process_res=process_res, grid=grid, device=device):
        typer.echo(line)


@app.command(context_settings=PASS_THROUGH, epilog=cli_help.TRAIN, rich_help_panel=cli_help.STAGES)
def train(
    context: typer.Context,
    cache: Annotated[
        str, typer.Option(help="A complete cache of the dataset; hf:// and s3:// are pulled first.", metavar="PATH")
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the whole cache first, as `geomcache verify` does.")
    ] = False,
) -> None:
    """Train Pi0.5 with geometry tokens from a cache: LeRobot's trainer, without DA3 in the loop."""
    from geomcache.sharing.pull import local_copy
    from geomcache.training.trainer import train as run

    run(local_copy(cache, say=typer.echo), context.args, verify=verify)


@app.command(name="eval", context_settings=PASS_THROUGH, epilog=cli_help.EVAL, rich_help_panel=cli_help.STAGES)
def evaluate(
    context: typer.Context,
    policy: Annotated[str, typer.Option(help="A pi05_geometry or pi05 checkpoint: a folder or a Hub id.")],
    allow_resize: Annotated[
        bool, typer.Option("--allow-resize", help="Accept pictures of a size other than the cache's.")
    ] = False,
) -> None:
    """Evaluate a checkpoint in closed loop with DA3 online: success rates, latency, videos."""
    from geomcache.evaluation.run import evaluate as run

    for line in run(policy, context.args, allow_resize=allow_resize, say=typer.echo).lines():
        typer.echo(line)


@app.command(epilog=cli_help.VERIFY, rich_help_panel=cli_help.CACHES)
def verify(
    path: Annotated[Path, typer.Argument(help="A cache.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Drop damaged shards, so that extract makes just those again.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
    parity: Annotated[
        int | None, typer.Option(help="Instead, encode N random frames again and compare.", metavar="N")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="The dataset's name.", show_default="as in the cache")] = None,
    root: Annotated[Path | None, typer.Option(help="The folder of a local dataset.", metavar="DIR")] = None,
    revision: Annotated[str | None, typer.Option(help="The dataset's branch, tag or commit.", metavar="REV")] = None,
    model: Annotated[
        str | None, typer.Option(help="A DA3 folder or Hub id, if not the one that the cache names.")
    ] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP, show_default=DEVICE_DEFAULT)] = None,
    max_steps: Annotated[
        float | None, typer.Option(help="Largest difference, in float16 steps.", show_default="1 in fp32, 512 in bf16")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of frames.")] = 0,
) -> None:
    """Check every byte of a cache; with --parity, compare cached frames with the online encoder."""
    if parity is None:
        given = {"dataset": dataset, "root": root, "revision": revision, "model": model, "device": device}
        _refuse("without --parity", {**given, "max-steps": max_steps})
        _verify_files(path, repair=repair, as_json=as_json)
        return
    _refuse("with --parity", {"repair": repair or None, "json": as_json or None})
    from geomcache.extraction.parity import parity as run

    report = run(
        path,
        parity,
        dataset=dataset,
        root=root,
        revision=revision,
        model=model,
        device=device,
        max_steps=max_steps,
        seed=seed,
    )
    for line in report.lines():
        typer.echo(line)
    report.check()


cli_look.register(app)
cli_share.register(app)


def _verify_files(path: Path, *, repair: bool, as_json: bool) -> None:
    import json

    from geomcache.cache.verify import verify as run

    report = run(path, repair=repair)
    for line in [json.dumps(report.to_dict(), indent=2)] if as_json else report.lines():
        typer.echo(line)
    if report.problems:
        raise typer.Exit(EXIT_DAMAGE)


def _refuse(when: str, options: dict[str, object]) -> None:
    """Refuse options that would have no effect."""
    for name, value in options.items():
        if value is not None:
            raise UserInputError(f"--{name}: expected none {when}, got one: leave it out")


def _batch_size(text: str | None) -> int | Literal["auto"] | None:
    if text is None:
        return None
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise UserInputError(f"batch-size: expected a number of frames, or auto, got {text!r}") from None


def _split(text: str | None) -> tuple[str, ...] | None:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text is not None else None


class _Stopped(BaseException):
    """A signal asked to stop. Not an Exception: no code between the command and `main` may take it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    raise _Stopped(number)


class _Echo(logging.Handler):
    """Print what the package logs: one plain line each, warnings to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(self.format(record), err=record.levelno >= logging.WARNING)


@contextlib.contextmanager
def _printed_log() -> Iterator[None]:
    """Print the package's log while a command runs."""
    logger, echo = logging.getLogger("geomcache"), _Echo()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(echo)
    logger.propagate = False  # LeRobot gives the root logger a handler of its own
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(echo)
        logger.propagate = True


def main() -> None:
    """Run the command line; a user's mistake becomes one line and exit code 2."""
    for number in (signal.SIGINT, signal.SIGTERM):  # both unwind the stack: files in progress are removed
        signal.signal(number, _stop)
    try:
        with _printed_log():
            code = app(prog_name="geomcache", standalone_mode=False)
    except TyperException as error:  # a call that cannot be parsed; without arguments typer has shown the help already
        if error.format_message():
            _fail(_usage_message(error), EXIT_USER_ERROR)
        sys.exit(EXIT_USER_ERROR)
    except GeomcacheError as error:
        _fail(str(error), EXIT_USER_ERROR)
    except OSError as error:  # the file system's own refusal: read-only, no permission, a file in the way
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}", EXIT_USER_ERROR)
    except _Stopped as stopped:
        name = signal.Signals(stopped.number).name
        _fail(f"stopped by {name}: run the same command again to resume", EXIT_SIGNAL + stopped.number)
    sys.exit(code)


def _usage_message(error: TyperException) -> str:
    """Put typer's message on one line, with the file that options came from and the command that shows help."""
    context: typer.Context | None = getattr(error, "ctx", None)
    message = " ".join(error.format_message().split()).rstrip(".")
    if context is None:
        return f"{message}: see `geomcache --help`"
    config = context.params.get("config")
    source = f" (other options are from {config})" if config is not None else ""
    return f"{message}{source}: see `{context.command_path} --help`"


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"geomcache: {message}", err=True)
    sys.exit(code)
