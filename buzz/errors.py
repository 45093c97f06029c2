"""The one exception for a user's mistake."""

from __future__ import annotations


class ConfigError(ValueError):
    """A value that a user gave and that cannot be served.

    Its text is one line that names the field, the value and the remedy, so that a runner can print
    it as it is and exit with status 2.

    Args:
        field: the setting as the user writes it, e.g. ``method.window``.
        value: what it was set to.
        remedy: what is wrong and what to write instead.
    """

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field}={value!r}: {remedy}")
        self.field, self.value, self.remedy = field, value, remedy
