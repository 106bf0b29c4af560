"""LeRobot's command lines: options -> its configuration objects, by its own parser; a refusal becomes one line."""

import contextlib
import io
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from geomcache.errors import GeomcacheError, UserInputError, one_line


def parse_options(
    program: str, config_class: type, args: Sequence[str], *, validate: Callable[[Any], None] | None = None
) -> Any:
    """LeRobot's configuration object of these options, parsed by LeRobot with our policy registered.

    Args:
        program: LeRobot's name of the command, such as ``lerobot-eval``.
        config_class: such as `EvalPipelineConfig`.
        args: its options, as on its command line.
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
    said = io.StringIO()
    try:
        with _command_line([program, *args]), contextlib.redirect_stderr(said):
            config = parser.wrap()(keep)()
    except SystemExit as stop:
        if not stop.code:
            raise
        raise _refusal(program, stop, said.getvalue()) from stop
    except (DraccusException, parser.PluginLoadError, ArgumentError) as error:
        raise _refusal(program, error, str(error)) from error
    except GeomcacheError:
        raise
    except (OSError, ValueError, TypeError, NotImplementedError, httpx.HTTPError) as error:
        raise UserInputError(f"{program}: {one_line(error)}") from error
    sys.stderr.write(said.getvalue())
    return config


def given(name: str, args: Sequence[str]) -> bool:
    """Whether options have a value for ``--name``."""
    from lerobot.configs.parser import parse_arg

    return parse_arg(name, args) is not None


@contextlib.contextmanager
def _command_line(argv: list[str]) -> Iterator[None]:
    """LeRobot's parser, and its validation after it, read the command line of the process."""
    before, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = before


def _refusal(program: str, error: BaseException, said: str) -> GeomcacheError:
    """LeRobot's refusal as one line: of usage, options and message, the message."""
    cause: BaseException | None = error
    while cause is not None:
        reason = cause.__cause__
        if isinstance(reason, GeomcacheError):
            return reason
        # "Couldn't instantiate": the reason says why
        if reason is not None and type(cause).__name__ == "ParsingError":
            return UserInputError(f"{program}: {one_line(reason)}")
        cause = reason or cause.__context__
    message = " ".join(said.rpartition("error: ")[2].split())
    return UserInputError(f"{program}: {message}: see `{program} --help`")
