"""``rlgov config``: the settings in force and the schema of the configuration file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from rlgov.commands.output import Json, put_json
from rlgov.commands.sections import sections
from rlgov.config import nearest
from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cyclopts import Argument


def show(
    section: str | None = None,
    *,
    json: Json = False,
    application: Annotated[App, Parameter(parse=False)],
) -> None:
    """Every setting in force, and where it comes from.

    Args:
        section: Show this section only (a command such as train).
        json: Report as JSON.
        application: The running command line, with its sources of settings.
    """
    known = sections()
    if section is not None and section not in known:
        raise ConfigError(f"there is no section {section!r}; {nearest(section, known)}")
    rows = [row for name in known if section in {None, name} for row in _rows(application, name)]
    if json:
        put_json([{"name": name, "value": value, "source": source} for name, value, source in rows])
        return
    width = max(len(name) for name, _, _ in rows)
    values = [_plain(value) for _, value, _ in rows]
    value_width = min(max(len(value) for value in values), 40)
    for (name, _, source), value in zip(rows, values, strict=True):
        sys.stdout.write(f"{name:<{width}}  {value:<{value_width}}  {source}\n")


def schema() -> None:
    """The JSON schema of the configuration file, for editors and checkers."""
    from pydantic import create_model

    from rlgov.config import Settings

    optional: dict[str, Any] = {name: (model | None, None) for name, model in sections().items()}
    whole = create_model("Configuration", __base__=Settings, **optional)
    put_json(whole.model_json_schema())


def _rows(app: App, section: str) -> Iterator[tuple[str, Any, str]]:
    command = app[section]
    with app.app_stack([section]):
        arguments = command.assemble_argument_collection()
        for source in app.config:
            source(command, (section,), arguments)
    for argument in arguments:
        name = argument.name.removeprefix("--")
        if name == argument.name:
            continue  # no flag: what follows after --
        if argument.children or name in {"json", "no-json"} or not argument.parse:
            continue
        value, source = _effective(argument)
        yield f"{section}.{name.replace('-', '_')}", value, source


def _effective(argument: Argument) -> tuple[Any, str]:
    tokens = argument.tokens
    if tokens:
        values = [
            token.value if token.value or token.implicit_value is None else token.implicit_value
            for token in tokens
        ]
        source = tokens[0].keyword if tokens[0].source == "env" else tokens[0].source
        return (values if len(values) > 1 else values[0]), str(source)
    if argument.required:
        return None, "required"
    return _jsonable(argument.field_info.default), "default"


def _jsonable(value: Any) -> Any:  # noqa: ANN401  # defaults of every kind
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_jsonable(item) for item in value]
    return value


def _plain(value: Any) -> str:  # noqa: ANN401  # as _jsonable
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)
