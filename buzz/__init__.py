"""Evicting KV caches for stock transformers: BUZZ, and the interface that all methods share."""

from buzz import requirements  # noqa: F401, I001 (first: an unknown transformers fails to import)
from buzz.adapter import CACHE_ARGUMENT
from buzz.beehive import BuzzFastPolicy, BuzzPolicy, BuzzStridedPolicy
from buzz.budget import Budget
from buzz.cache import EvictionCache
from buzz.errors import ConfigError
from buzz.forked import ForkedCache
from buzz.granularity import Constrained
from buzz.honeycomb import HoneycombPolicy
from buzz.policy import POLICIES, Policy, register

__all__ = [
    "CACHE_ARGUMENT",
    "POLICIES",
    "Budget",
    "BuzzFastPolicy",
    "BuzzPolicy",
    "BuzzStridedPolicy",
    "ConfigError",
    "Constrained",
    "EvictionCache",
    "ForkedCache",
    "HoneycombPolicy",
    "Policy",
    "register",
]
