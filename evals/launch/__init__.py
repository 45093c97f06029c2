"""Hydra and outward: sweeps, the table at the end, services that take results."""

import evals.run.plan  # noqa: F401  (tells Hydra of the methods)
