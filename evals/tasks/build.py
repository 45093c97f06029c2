"""Makes objects of the classes that a configuration names, and checks their fields' types."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from buzz.errors import ConfigError

STRICT = ConfigDict(strict=True, allow_inf_nan=False)  # `no` is no boolean
KNOWN = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


def build(section: str, config: dict[str, Any], kind: type) -> Any:
    """An object of the class that a section names as `_target_`.

    Nothing but subclasses of `kind` is called.

    Raises:
        ConfigError: naming the section, whatever is wrong.
    """
    target = config.get("_target_")
    try:
        found = resolve_name(str(target))
    except Exception as error:
        raise _refused(section, target, error) from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ConfigError(f"{section}._target_", target, f"is no {kind.__name__}")
    return construct(section, found, {k: v for k, v in config.items() if k != "_target_"})


def construct(section: str, kind: type, fields: Mapping[str, Any]) -> Any:
    """An object of a dataclass.

    Raises:
        ConfigError: naming the section: there is no such field, or the class refuses a value.
    """
    known = sorted(field.name for field in dataclasses.fields(kind) if field.init)
    for name, value in fields.items():
        if name not in known:
            remedy = f"choose one of {', '.join(known)}" if known else "there is none"
            raise ConfigError(f"{section}.{name}", value, f"no such setting; {remedy}")
    try:
        return kind(**fields)
    except ConfigError:
        raise
    except Exception as error:
        raise _refused(section, kind.__name__, error) from error


def _refused(section: str, value: Any, error: Exception) -> ConfigError:
    return ConfigError(section, value, (str(error) or type(error).__name__).splitlines()[0])


def with_lists(config: dict[str, Any]) -> dict[str, Any]:
    """A section with a list of one in place of a single value, where its class wants a list.

    >>> with_lists({"_target_": "evals.tasks.throughput.Throughput", "lengths": 2000})["lengths"]
    [2000]
    """
    try:
        hints = get_type_hints(resolve_name(str(config.get("_target_"))))
    except Exception:  # build() says what is wrong with it
        return config
    return {
        name: [value]
        if isinstance(value, int | float | str) and _of_many(hints.get(name))
        else value
        for name, value in config.items()
    }


def _of_many(hint: Any) -> bool:
    return get_origin(hint) is Sequence or any(_of_many(one) for one in get_args(hint))


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
    """Raises ConfigError, naming the value `name`, unless it has a type, which may be annotated."""
    try:
        TypeAdapter(kind, config=STRICT).validate_python(value)
    except ValidationError as error:
        raise refusal(name, error) from error


def validate(kind: type[BaseModel], values: Mapping[str, Any], *section: str) -> None:
    """Raises ConfigError unless a section has the fields and types of `kind`."""
    try:
        kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, (*section, *first["loc"])))
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(kind.model_fields)) if len(first["loc"]) == 1 else ""
            remedy = "no such setting" + (f"; choose one of {known}" if known else "")
            raise ConfigError(name, first["input"], remedy) from error
        raise refusal(name, error) from error


def refusal(name: str, error: ValidationError) -> ConfigError:
    """The first of pydantic's errors, in one line."""
    first = error.errors()[0]
    if first["type"] == "missing":
        return ConfigError(name, None, "is missing; it must be given")
    message = first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "literal_error":
        message = f"choose one of {first['ctx']['expected'].replace(' or ', ', ')}".replace("'", "")
    if first["type"].startswith("bool_"):
        message += "; write true or false"
    return ConfigError(name, first["input"], message)
