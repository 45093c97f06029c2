"""Definitions, prompts and modules of lm-eval's tasks, without importing all of lm-eval."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from jinja2 import Environment

from buzz.errors import ConfigError


@dataclass(frozen=True)
class LmEval:
    """A folder of lm-eval's tasks.

    Attributes:
        folder: its name.
        task: this project's task that is made of it.
        extra: the extra of this project's package that installs lm-eval and what the folder needs.
    """

    folder: str
    task: str
    extra: str

    @property
    def missing(self) -> ConfigError:
        """The error if something is not installed."""
        remedy = f"needs lm-eval and what it imports: pip install -e '.[{self.extra}]'"
        return ConfigError("task", self.task, remedy)

    @property
    def path(self) -> Path:
        spec = importlib.util.find_spec("lm_eval")  # found without importing all of it
        if spec is None or not spec.submodule_search_locations:
            raise self.missing
        return Path(next(iter(spec.submodule_search_locations))) / "tasks" / self.folder

    @cache  # noqa: B019 (there are a few objects, which live as long as the process)
    def read(self, name: str) -> dict[str, Any]:
        """A YAML file, with the one that it includes; `!function module.name` is read as text."""
        text = (self.path / name).read_text(encoding="utf-8")
        own: dict[str, Any] = yaml.load(text, Loader=_Loader)
        included = own.pop("include", None)
        return own if included is None else self.read(included) | own

    def module(self, name: str) -> ModuleType:
        """The Python file, as a module of its own.

        Raises:
            ConfigError: a package that it imports is missing.
        """
        spec = importlib.util.spec_from_file_location(
            f"lm_eval_{self.folder}_{name}", self.path / f"{name}.py"
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            raise self.missing from error
        return module


def render(template: str, /, **row: Any) -> str:
    """lm-eval's prompt for a row of the data."""
    return Environment(keep_trailing_newline=True).from_string(template).render(row)


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
