"""Hydra and outward: sweeps, the table at the end, services that take results."""
