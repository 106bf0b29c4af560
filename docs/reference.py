"""Make the parts of the pages that describe the code from the code: commands, options of the policy, models.

`docs/hooks.py` puts these texts into the pages when the site is built. None of them imports torch or LeRobot.
"""

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from geomcache.da3.catalog import MODELS

REPOSITORY = Path(__file__).parents[1]
POLICY_OPTIONS = {  # file and class, in the order of their fields in the configuration
    REPOSITORY / "geomcache" / "policy" / "options.py": "GeometryOptions",
    REPOSITORY / "geomcache" / "policy" / "paligemma_options.py": "PaliGemmaOptions",
}
NO_DEFAULT = "\N{EM DASH}"
TYPES = {"str": "text", "int": "integer", "float": "number"}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def command_reference() -> str:
    """Describe every command of `geomcache` in its panel, and the options before a command."""
    from geomcache.cli.main import app

    group: Any = typer.main.get_command(app)
    panels: dict[str, list[str]] = {}
    for name, command in group.commands.items():
        panels.setdefault(command.rich_help_panel, []).append(_command(name, command))
    root = [param for param in group.get_params(typer.Context(group)) if not param.hidden]
    sections = [f"## {panel}\n\n" + "\n\n".join(commands) for panel, commands in panels.items()]
    return "\n\n".join([*sections, "## Before the command\n\n" + _options(root, typer.Context(group))])


def _command(name: str, command: Any) -> str:
    context = typer.Context(command, info_name=f"geomcache {name}")
    params = [param for param in command.get_params(context) if not param.hidden and param.name != "help"]
    arguments = [param for param in params if param.param_type_name == "argument"]
    usage = " ".join([f"geomcache {name}", *(_placeholder(param) for param in arguments), "[OPTIONS]"])
    if command.context_settings.get("ignore_unknown_options"):
        usage += " [OPTIONS OF LEROBOT]"
    parts = [f"### geomcache {name}", command.help, f"```text\n{usage}\n```"]
    if arguments:
        parts.append(table(("argument", "meaning"), [(f"`{_placeholder(each)}`", each.help) for each in arguments]))
    panels: dict[str | None, list[Any]] = {}
    for param in params:
        if param.param_type_name == "option":
            panels.setdefault(param.rich_help_panel, []).append(param)
    for panel, options in panels.items():
        parts.append((f"**{panel}**\n\n" if panel else "") + _options(options, context))
    parts.append(_examples(command.epilog))
    return "\n\n".join(parts)


def _options(options: Iterable[Any], context: typer.Context) -> str:
    rows = []
    for option in options:
        names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
        rows.append((names, _kind(option, context), _default(option), _code_spans(option.help)))
    return table(("option", "type", "default", "meaning"), rows)


def _placeholder(argument: Any) -> str:
    return str(argument.metavar or argument.name).upper()


def _kind(option: Any, context: typer.Context) -> str:
    if option.is_flag:
        return "flag"
    kind = str(option.display_type(context)).strip("<>")
    if "|" in (option.metavar or ""):
        kind = option.metavar
    if option.multiple:
        return f"{kind.removeprefix('list[').removesuffix(']').lower()}, more than once"
    return ", ".join(f"`{choice}`" for choice in kind.split("|")) if "|" in kind else TYPES.get(kind, kind)


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if isinstance(option.show_default, str):  # in words, for a default that the code works out
        return option.show_default
    if option.is_flag:
        return "on" if option.default else "off"
    return NO_DEFAULT if option.default is None else f"`{option.default}`"


def _examples(epilog: str) -> str:
    """Turn the text below a command's help into Markdown; indented lines become a block of commands."""
    blocks: list[str] = []
    for paragraph in epilog.strip().split("\n\n"):
        lines = paragraph.replace("[bold]", "**").replace("[/bold]", "**").replace("\\[", "[").splitlines()
        if text := [line for line in lines if not line.startswith(" ")]:
            blocks.append(_code_spans(" ".join(text)))
        if commands := [line.removeprefix("  ") for line in lines if line.startswith(" ")]:
            blocks.append("```bash\n" + "\n".join(commands) + "\n```")
    return "\n\n".join(blocks)


def _code_spans(text: str) -> str:
    """Mark the options in a sentence as code."""
    parts = text.split("`")  # every second one is code already
    parts[::2] = [re.sub(r"(?<!\S)--[\w.=:-]*\w", r"`\g<0>`", part) for part in parts[::2]]
    return "`".join(parts)


def policy_options() -> str:
    """Describe the options that `pi05_geometry` adds to Pi0.5's, from the docstrings under the fields.

    `pi0_geometry` has all of them, `smolvla_geometry` those of `GeometryOptions`.
    """
    return table(
        ("option", "type", "default", "meaning"),
        [(f"`--policy.{name}`", f"`{kind}`", default, text) for name, kind, default, text in _policy_fields()],
    )


def _policy_fields() -> Iterator[tuple[str, str, str, str]]:
    """Read name, annotation, default and docstring of each field, without importing the class: it imports LeRobot."""
    for file, class_name in POLICY_OPTIONS.items():
        module = ast.parse(file.read_text(encoding="utf-8"))
        (config,) = (node for node in module.body if isinstance(node, ast.ClassDef) and node.name == class_name)
        yield from _fields(config)


def _fields(config: ast.ClassDef) -> Iterator[tuple[str, str, str, str]]:
    for field, below in zip(config.body, config.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation):
            assert isinstance(below, ast.Expr)
            assert isinstance(below.value, ast.Constant)
            assert field.value is not None
            text = " ".join(str(below.value.value).split()).replace("``", "`")
            default = _as_typed(ast.literal_eval(field.value))
            kind = ast.unparse(field.annotation).removesuffix(" | None")
            yield ast.unparse(field.target), kind, default, text


def _as_typed(value: object) -> str:
    """Return a value as LeRobot's command line takes it."""
    if value is None:
        return NO_DEFAULT
    if isinstance(value, tuple):
        return f"`[{','.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def model_licences() -> str:
    """List the published DA3 models and the licences of their weights."""
    rows = [
        (f"`{model.name}`", model.license, "yes" if model.ray_head else "no: cannot be used", model.replaced_by or "")
        for model in MODELS.values()
    ]
    return table(("model", "licence of the weights", "predicts rays", "upstream recommends instead"), rows)


MARKERS: dict[str, Callable[[], str]] = {
    "commands": command_reference,
    "policy options": policy_options,
    "model licences": model_licences,
}
"""The names that a page may have in ``<!-- generated: NAME -->``."""
