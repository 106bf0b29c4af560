"""Commands whose options are the fields of a dataclass: each field is annotated with its option and help text."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, get_args, get_type_hints

from geomcache.extraction.options import FromText
from geomcache.sharing.address import path_or_address


def with_options(
    command: Callable[[Any], None],
    options_class: type,
    extra: Iterable[inspect.Parameter] = (),
    choices: Mapping[str, Callable[[Mapping[str, Any]], object]] = MappingProxyType({}),
) -> Callable[..., None]:
    """Turn a command that takes an object of options into one whose signature typer can read: a parameter per field.

    The fields of the class itself come before those that it inherits. The values of `extra` parameters go nowhere:
    their callbacks have used them. A field that `choices` names may be left out: its function chooses a value, given
    those of all fields.
    """
    hints = get_type_hints(options_class, include_extras=True)
    parsers: dict[str, FromText] = {}
    parameters = []
    for field in _own_fields_first(options_class):
        annotation, default = hints[field.name], field.default
        field_type, (option, *markers) = annotation.__origin__, annotation.__metadata__
        for marker in markers:
            parsers[field.name] = marker
            annotation = Annotated[str if default is not None else str | None, option]
        if {Path, str} <= {*get_args(field_type)}:  # typer knows no such type: a path or an address is text
            parsers[field.name] = FromText(path_or_address)
            annotation = Annotated[str | None if default is None else str, option]
        if field.name in choices:
            annotation, default = Annotated[field_type | None, option], None
        if isinstance(default, tuple):
            default = ",".join(default)
        parameters.append(parameter(field.name, annotation, default))
    names = [each.name for each in parameters]
    parameters += extra

    def run(**given: Any) -> None:
        values = {name: given[name] for name in names}
        for name, marker in parsers.items():
            if values[name] is not None:
                values[name] = marker.parse(values[name])
        for name, choose in choices.items():
            if values[name] is None:
                values[name] = choose(values)
        command(options_class(**values))

    run.__doc__ = command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def parameter(name: str, annotation: Any, default: object) -> inspect.Parameter:
    """Return a parameter of a command; the default is ``MISSING`` where the option must be given."""
    if default is MISSING:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _own_fields_first(options_class: Any) -> Iterator[Field[Any]]:
    by_name = {field.name: field for field in fields(options_class)}
    for each in options_class.__mro__:
        yield from (by_name.pop(name) for name in inspect.get_annotations(each) if name in by_name)
