"""Turn options into LeRobot's configuration objects, by its own parser; a refusal becomes one line.

`replaced` is the form of all seams into LeRobot's commands.
"""

import contextlib
import io
import logging
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from geomcache.errors import GeomcacheError, UserInputError, one_line

logger = logging.getLogger(__name__)

# The two lines that each of torchcodec's tracebacks ends with where FFmpeg's libraries are missing.
_NO_FFMPEG = re.compile(
    r"lib(?:av|sw)\w+\.so\S*: cannot open shared object file|Could not load this library: .*libtorchcodec"
)


def parse_options(
    program: str, config_class: type, args: Sequence[str], *, validate: Callable[[Any], None] | None = None
) -> Any:
    """Parse options to LeRobot's configuration object, with our policy registered.

    Args:
        program: LeRobot's name of the command, such as ``lerobot-eval``.
        config_class: class of the object, such as `EvalPipelineConfig`.
        args: options of the command, as on its command line.
        validate: called with the object while LeRobot still sees these options as the command line of the process.

    Raises:
        UserInputError: LeRobot does not know an option or refuses its value; the message is LeRobot's.
        GeomcacheError: the policy's configuration refuses it.
        SystemExit: the options ask for LeRobot's help, which is printed.
    """
    import httpx
    from draccus.utils import DraccusException
    from lerobot.configs import parser
    from lerobot.utils.import_utils import register_third_party_plugins

    def keep(config: Any) -> Any:
        if validate is not None:
            validate(config)
        return config

    keep.__annotations__["config"] = config_class  # what LeRobot's parser asks a main function for
    # All of the plugin, as --discover_packages_path loads it: saved processors name our steps.
    parser.load_plugin("geomcache.policy")
    register_third_party_plugins()
    usage = io.StringIO()  # what argparse prints
    try:
        with (
            replaced(sys, "argv", lambda _: [program, *args]),  # LeRobot's parser and validation read it
            contextlib.redirect_stderr(usage),
            short_ffmpeg_warning(),
        ):
            config = parser.wrap()(keep)()
    except SystemExit as stop:
        if not stop.code:
            raise
        raise _refusal(program, stop, usage.getvalue()) from stop
    except (DraccusException, parser.PluginLoadError, ArgumentError) as error:
        raise _refusal(program, error, str(error)) from error
    except GeomcacheError:
        raise
    except (OSError, ValueError, TypeError, NotImplementedError, httpx.HTTPError) as error:
        raise UserInputError(f"{program}: {one_line(error)}") from error
    sys.stderr.write(usage.getvalue())
    return config


@contextlib.contextmanager
def short_ffmpeg_warning() -> Iterator[None]:
    """Shorten LeRobot's warning that torchcodec finds no FFmpeg, 100 lines and more, to one line with what to install.

    LeRobot decodes with PyAV then. Other reasons why torchcodec cannot be loaded are logged as they are.
    """
    upstream = logging.getLogger("lerobot.utils.import_utils")
    shown = False

    def shorten(record: logging.LogRecord) -> bool:
        nonlocal shown
        reasons = re.findall(r"^(?:\w+Error|\w+Exception): (.*)$", record.getMessage(), re.MULTILINE)
        ffmpeg_is_missing = "libtorchcodec" in record.getMessage() and all(map(_NO_FFMPEG.match, reasons))
        if not reasons or not ffmpeg_is_missing:
            return True
        if not shown:
            logger.warning(
                "torchcodec finds no FFmpeg libraries: LeRobot decodes videos with PyAV, which is slower: install"
                " FFmpeg (Debian, Ubuntu: apt-get install ffmpeg)"
            )
        shown = True
        return False

    upstream.addFilter(shorten)
    try:
        yield
    finally:
        upstream.removeFilter(shorten)


def given(name: str, args: Sequence[str]) -> bool:
    """Return whether options have a value for ``--name``."""
    from lerobot.configs.parser import parse_arg

    return parse_arg(name, args) is not None


@contextlib.contextmanager
def replaced(module: ModuleType | type, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace a name of a module or class, while this lasts, by what `make` makes of it."""
    upstream = getattr(module, name)
    setattr(module, name, make(upstream))
    try:
        yield
    finally:
        setattr(module, name, upstream)


def _refusal(program: str, error: BaseException, text: str) -> GeomcacheError:
    """Return LeRobot's refusal as one line: of usage, options and message, the message."""
    cause: BaseException | None = error
    while cause is not None:
        reason = cause.__cause__
        if isinstance(reason, GeomcacheError):
            return reason
        # "Couldn't instantiate": the reason says why
        if reason is not None and type(cause).__name__ == "ParsingError":
            return UserInputError(f"{program}: {one_line(reason)}")
        cause = reason or cause.__context__
    message = " ".join(text.rpartition("error: ")[2].split())
    return UserInputError(f"{program}: {message}: see `{program} --help`")
