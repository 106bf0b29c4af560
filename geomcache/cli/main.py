"""The command line: parse the options, call a room, and turn errors into one line.

Heavy imports stay inside the commands, so that `geomcache --help` answers at once.
"""

import contextlib
import json
import logging
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from geomcache.cli import compare as cli_compare
from geomcache.cli import defaults
from geomcache.cli import extract as cli_extract
from geomcache.cli import help as cli_help
from geomcache.cli import look as cli_look
from geomcache.cli import policies as cli_policies
from geomcache.cli import serve as cli_serve
from geomcache.cli import share as cli_share
from geomcache.cli import update as cli_update
from geomcache.errors import GeomcacheError, UserInputError
from geomcache.sharing.address import is_remote, public_address

if TYPE_CHECKING:
    from geomcache.cache.verify import VerifyReport

EXIT_DAMAGE = 1
EXIT_USER_ERROR = 2
EXIT_SIGNAL = 128  # plus the signal's number, as a shell reports it

DEVICE_HELP, DEVICE_DEFAULT = "Such as cuda:1 or cpu.", "the GPU where there is one"
RESUMABLE = ("extract", "update", "push", "pull")  # commands that continue where they were stopped
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


cli_extract.register(app)


@app.command(epilog=cli_help.INFO, rich_help_panel=cli_help.CACHES)
def info(
    path: Annotated[str, typer.Argument(help="A cache, or its address.", metavar="PATH")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """Print what is in a cache: model, dataset, grid, bytes, episodes, statistics."""
    from geomcache.look.info import describe, describe_lines

    facts = describe(path)
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(describe_lines(facts)))


@app.command(epilog=cli_help.PROBE, rich_help_panel=cli_help.MODELS)
def probe(
    model: Annotated[str, typer.Option(help="A DA3 name such as DA3-LARGE, a Hub id, or a folder.")],
    image: Annotated[
        list[Path],
        typer.Option(help="A picture. Repeat it for several views of one scene; the first is the reference."),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the picture.", metavar="DIR")] = Path("outputs/probe"),
    process_res: Annotated[int, typer.Option(help="Longest side of what the network sees, pixels.")] = 504,
    grid: Annotated[str, typer.Option(help="patch, native, or cells such as 14x14.")] = "patch",
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP, show_default=DEVICE_DEFAULT)] = None,
) -> None:
    """Run DA3 on pictures: print shapes and ranges, and save a picture of the maps. Checks that a model works."""
    from geomcache.look.probe import probe as run

    run(model, image, output, process_res=process_res, grid=grid, device=device)


@app.command(context_settings=PASS_THROUGH, epilog=cli_help.TRAIN, rich_help_panel=cli_help.STAGES)
def train(
    context: typer.Context,
    cache: Annotated[
        str | None,
        typer.Option(
            help="A sealed cache of the dataset, or its address: hf://..., s3://...",
            metavar="PATH",
            show_default="the only one in the current folder",
        ),
    ] = None,
    cache_disk: Annotated[
        str | None,
        typer.Option(
            help="How much of a cache at an address this machine keeps: the shards that were used last.",
            metavar="SIZE",
            show_default="50GB",
        ),
    ] = None,
    pull: Annotated[
        bool, typer.Option("--pull", help="Download the whole cache of an address first, like `geomcache pull`.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read and check the whole cache first, like `geomcache verify`.")
    ] = False,
) -> None:
    """Train Pi0.5 with geometry from a cache, as tokens or by a loss, by LeRobot's trainer, without DA3 in the loop."""
    from geomcache.sharing.fetching_store import open_for_training
    from geomcache.sharing.pull import local_copy
    from geomcache.training.trainer import train as run

    path = str(defaults.choose_cache(Path())) if cache is None else cache
    if pull or not is_remote(path):
        _refuse("with --pull" if pull else "for a cache on this machine", {"cache-disk": cache_disk})
        path = str(local_copy(path))
    else:
        _refuse("for a cache at an address without --pull, as its shards are checked", {"verify": verify or None})
    store = open_for_training(path, _parse_size("cache-disk", cache_disk or "50GB"))
    path = public_address(path)  # for the commands in messages
    run(path, defaults.with_training_choices(Path(path), context.args, store), verify=verify, store=store)


@app.command(name="eval", context_settings=PASS_THROUGH, epilog=cli_help.EVAL, rich_help_panel=cli_help.STAGES)
def evaluate(
    context: typer.Context,
    policy: Annotated[str, typer.Option(help="A checkpoint, with geometry or plain: a folder or a Hub id.")],
    allow_resize: Annotated[
        bool, typer.Option("--allow-resize", help="Accept pictures of a size other than the cache's.")
    ] = False,
    results: Annotated[
        Path | None,
        typer.Option(
            help="CSV file with a row for each episode. Episodes that have a row are not run again.",
            metavar="FILE",
            show_default="episodes.csv in --output_dir",
        ),
    ] = None,
) -> None:
    """Evaluate a checkpoint in closed loop with DA3 online, and print success rates and latency."""
    from geomcache.evaluation.run import evaluate as run

    typer.echo("\n".join(run(policy, context.args, allow_resize=allow_resize, results=results).lines()))


cli_compare.register(app)


cli_serve.register(app)


@app.command(epilog=cli_help.VERIFY, rich_help_panel=cli_help.CACHES)
def verify(
    cache: Annotated[str, typer.Argument(help="A cache, or its address.", metavar="PATH")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Drop damaged shards, so that extract makes just those again.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
    parity: Annotated[
        int | None, typer.Option(help="Instead, encode N random frames again and compare.", metavar="N")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="A dataset whose episodes and pictures are compared, too.",
            show_default="with --parity as in the cache",
        ),
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Its folder, where it is a local one.", metavar="DIR")] = None,
    revision: Annotated[str | None, typer.Option(help="The dataset's branch, tag or commit.", metavar="REV")] = None,
    model: Annotated[
        str | None, typer.Option(help="A DA3 folder or Hub id, if not the one that the cache names.")
    ] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP, show_default=DEVICE_DEFAULT)] = None,
    max_steps: Annotated[
        float | None, typer.Option(help="Refuse a larger difference, in float16 steps, too.", show_default="no bound")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of frames.")] = 0,
) -> None:
    """Check every byte of a cache; with --parity, compare cached frames with the online encoder."""
    if is_remote(cache):
        others = {"repair": repair or None, "parity": parity, "dataset": dataset, "root": root, "revision": revision}
        _refuse("with an address", others | {"model": model, "device": device, "max-steps": max_steps})
        _verify_address(cache, as_json=as_json)
        return
    path = Path(cache)
    if parity is None:
        _refuse("without --parity", {"model": model, "device": device, "max-steps": max_steps})
        _verify_files(path, repair=repair, as_json=as_json)
        if dataset or root or revision:
            _verify_pictures(path, dataset, root, revision, as_json=as_json)
        return
    _refuse("with --parity", {"repair": repair or None})
    if as_json:
        logging.getLogger("geomcache").setLevel(logging.WARNING)  # standard output is the object alone
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
    for line in [json.dumps(report.to_dict(), indent=2)] if as_json else report.lines():
        typer.echo(line)
    report.check()


cli_update.register(app)
cli_look.register(app)
cli_share.register(app)
cli_policies.register(app)


def _verify_address(address: str, *, as_json: bool) -> None:
    from geomcache.sharing.remote_check import verify_address

    _print_report(verify_address(address), as_json=as_json)


def _verify_files(path: Path, *, repair: bool, as_json: bool) -> None:
    from geomcache.cache.verify import verify as run

    _print_report(run(path, repair=repair), as_json=as_json)


def _print_report(report: "VerifyReport", *, as_json: bool) -> None:
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else "\n".join(report.lines()))
    if report.problems:
        raise typer.Exit(EXIT_DAMAGE)


def _verify_pictures(
    path: Path, dataset: str | None, root: Path | None, revision: str | None, *, as_json: bool
) -> None:
    from geomcache.frames.of_cache import check_dataset

    if as_json:
        logging.getLogger("geomcache").setLevel(logging.WARNING)  # standard output is the object alone
    typer.echo(check_dataset(path, dataset=dataset, root=root, revision=revision), err=as_json)


def _refuse(when: str, options: dict[str, object]) -> None:
    """Refuse options that would have no effect."""
    for name, value in options.items():
        if value is not None:
            raise UserInputError(f"--{name}: expected none {when}, got one: leave it out")


def _parse_size(name: str, text: str) -> int:
    from geomcache.progress import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError:
        raise UserInputError(f"--{name}: expected a size such as 50GB, got {text!r}") from None


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
        _fail(f"stopped by {name}: {_how_to_resume(stopped)}", EXIT_SIGNAL + stopped.number)
    sys.exit(code)


def _how_to_resume(stopped: _Stopped) -> str:
    """Return what is true of the command that was stopped; a training run has noted it on the exception."""
    notes = getattr(stopped, "__notes__", [])
    if notes:
        return str(notes[-1])
    if len(sys.argv) > 1 and sys.argv[1] in RESUMABLE:
        return "run the same command again to resume"
    return "nothing is resumed, the same command starts again"


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
