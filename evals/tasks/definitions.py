"""lm-eval's task definitions, read without importing lm-eval as a whole."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from buzz.errors import ConfigError


def definitions(name: str, task: str, remedy: str) -> Path:
    """The folder `name` of lm-eval's tasks.

    Raises:
        ConfigError: naming `task`: lm-eval is not installed.
    """
    spec = importlib.util.find_spec("lm_eval")  # found without importing all of it
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("task", task, remedy)
    return Path(next(iter(spec.submodule_search_locations))) / "tasks" / name


def read_definition(path: Path) -> dict[str, Any]:
    """A YAML file over the one that it includes; `!function module.name` is that text."""
    own: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    included = own.pop("include", None)
    return own if included is None else read_definition(path.parent / included) | own


def load_module(path: Path) -> ModuleType:
    """The Python file, as a module of its own.

    Raises:
        ImportError: what it imports is not there.
    """
    spec = importlib.util.spec_from_file_location(f"lm_eval_{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
