"""Objects of the classes that a configuration names; checks of their fields, no conversions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from buzz.errors import ConfigError

STRICT = ConfigDict(strict=True, allow_inf_nan=False)  # `no` is no boolean


def build(section: str, config: dict[str, Any], kind: type) -> Any:
    """An object of the class that a section names; whatever goes wrong names the section.

    Nothing is called that is not a class of this `kind`.
    """
    target = config.get("_target_")
    try:
        found = resolve_name(str(target))
        if not (isinstance(found, type) and issubclass(found, kind)):
            raise ConfigError(f"{section}._target_", target, f"is no {kind.__name__}")
        return found(**{key: value for key, value in config.items() if key != "_target_"})
    except ConfigError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(section, target, reason) from error


def check_fields(section: str, built: Any) -> None:
    """Compares the fields of a dataclass with their annotations.

    Raises:
        ConfigError: a field has another type; it is called `section`.`field`.
    """
    hints = get_type_hints(type(built), include_extras=True)
    for field in dataclasses.fields(built):
        if field.init:
            check(f"{section}.{field.name}", getattr(built, field.name), hints[field.name])


def check(name: str, value: Any, kind: Any) -> None:
    """Raises ConfigError, which calls the value `name`, unless it is of a type, maybe annotated."""
    try:
        TypeAdapter(kind, config=STRICT).validate_python(value)
    except ValidationError as error:
        raise refusal(name, error) from error


def validate(kind: type[BaseModel], values: Mapping[str, Any], *section: str) -> None:
    """Raises ConfigError unless a section has all that `kind` wants of it."""
    try:
        kind.model_validate(values)
    except ValidationError as error:
        name = ".".join(map(str, (*section, *error.errors()[0]["loc"])))
        raise refusal(name, error) from error


def refusal(name: str, error: ValidationError) -> ConfigError:
    """What pydantic found first, as a line."""
    first = error.errors()[0]
    if first["type"] == "missing":
        return ConfigError(name, None, "is missing; it must be given")
    message = first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "literal_error":
        message = f"choose one of {first['ctx']['expected'].replace(' or ', ', ')}".replace("'", "")
    return ConfigError(name, first["input"], message)
