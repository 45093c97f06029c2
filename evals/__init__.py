"""The harness: tasks, generation with measurements, run records and tables."""

from pathlib import Path

CONFIGS = Path(__file__).with_name("configs")  # in a checkout a link to those beside `evals`
