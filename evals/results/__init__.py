"""Records on disk, and their means and intervals. Knows no task, no model and no report."""

from evals.results.frame import load

__all__ = ["load"]
