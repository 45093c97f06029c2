"""What is on disk, and what it amounts to. Knows no task, no model and no report."""

from evals.results.frame import load

__all__ = ["load"]
