"""What a run's task says of itself: where reports show it, and what claims may read of it."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules, resolve_name

from evals import tasks
from evals.results.runs import Run
from evals.tasks.base import OTHERS, Section, Task


def kind(run: Run) -> type[Task]:
    """The class of a run's task; of one that is not there any more, what all tasks have."""
    try:
        found = resolve_name(str(run.config["task"].get("_target_")))
    except (ImportError, AttributeError, ValueError):
        return Task
    return found if isinstance(found, type) and issubclass(found, Task) else Task


def sections() -> list[Section]:
    """Those of all tasks in the folder, by name; what the others share comes last."""
    for module in iter_modules(tasks.__path__):
        import_module(f"{tasks.__name__}.{module.name}")
    waiting, found = [Task], {}
    while waiting:
        waiting += (task := waiting.pop()).__subclasses__()
        found[task.section.name] = task.section
    del found[OTHERS.name]
    return [*(found[name] for name in sorted(found)), OTHERS]


def about(run: Run, topic: str) -> set[str] | None:
    """The groups of a run's samples that a claim about a topic may read; empty: none of them.

    Returns:
        None for all of them.
    """
    groups = kind(run).topics(run.config["task"]).get(topic, set())
    return groups if groups is None else groups.intersection(r["group"] for r in run.ran)
