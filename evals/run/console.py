"""Where progress and remarks go: not into what a program reads."""

from rich.console import Console

console = Console(stderr=True)
