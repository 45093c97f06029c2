"""What the contracts of import-linter (pyproject.toml, `make lint`) cannot say."""

from __future__ import annotations

import sys

import grimp
import pytest


@pytest.mark.parametrize(
    ("package", "may"),
    [
        # typing_extensions comes with torch; triton is torch's where there is one.
        ("buzz", {"buzz", "torch", "transformers", "numpy", "triton", "typing_extensions"}),
        ("baselines", {"baselines", "buzz", "torch", "typing_extensions"}),
    ],
)
def test_the_library_needs_nothing_but(package: str, may: set[str]) -> None:
    graph = grimp.build_graph(
        "buzz", "baselines", "evals", include_external_packages=True, cache_dir=None
    )
    own = [module for module in graph.modules if module.partition(".")[0] == package]
    assert len(own) > 5
    imported = {
        name.partition(".")[0] for m in own for name in graph.find_modules_directly_imported_by(m)
    }
    assert imported - may - set(sys.stdlib_module_names) == set()
