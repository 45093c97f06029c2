"""Refuses, in one line, a transformers that this package does not know."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

TRANSFORMERS = ">=5.20,<6"  # as in pyproject.toml


def check_transformers() -> None:
    """Looks at what is installed, without importing it.

    Raises:
        ImportError: there is none, or one outside the range.
    """
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        installed = None
    if installed is None or not SpecifierSet(TRANSFORMERS).contains(installed, prereleases=True):
        raise ImportError(
            f"buzz needs transformers {TRANSFORMERS}, and {installed or 'none'} is installed:"
            f" pip install 'transformers{TRANSFORMERS}'"
        )


check_transformers()
