"""Runs one configuration: `python run.py method=buzz task=needle budget=0.25`.

Several at a time, with one table in the end: `python run.py -m method=full,streaming_llm,h2o,buzz`;
several tasks: `python run.py task=suite 'task.tasks=[needle,pydoc]'`; sweeps and where they run:
docs/sweeps.md; exit statuses and what is written when: docs/faults.md.
"""

from __future__ import annotations

import sys

from evals.launch.command import cli

if __name__ == "__main__":
    sys.exit(cli())
