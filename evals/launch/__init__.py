"""Hydra and outward: sweeps, the table at the end, services that take results."""

import os

# cuDNN's attention plans anew for every length of a cache that grows: that would slow down the
# full cache alone. PyTorch reads it once.
os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")

import evals.run.plan  # noqa: E402, F401  (tells Hydra of the methods)
