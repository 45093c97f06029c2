"""The methods that BUZZ is compared with, each in a file of its own."""

from baselines.a2sf import A2SFPolicy
from baselines.chunk_kv import ChunkKVPolicy
from baselines.critical_kv import CriticalKVPolicy
from baselines.defensive_kv import DefensiveKVPolicy
from baselines.full import FullPolicy
from baselines.h2o import H2OPolicy
from baselines.keydiff import KeyDiffPolicy
from baselines.knorm import KnormPolicy
from baselines.local import LocalPolicy
from baselines.r_kv import RKVPolicy
from baselines.random import RandomPolicy
from baselines.snapkv import SnapKVPolicy
from baselines.snapkv_every import SnapKVEveryPolicy
from baselines.streaming_llm import StreamingLLMPolicy
from baselines.tova import TOVAPolicy
from baselines.vatp import VATPPolicy

__all__ = [
    "A2SFPolicy",
    "ChunkKVPolicy",
    "CriticalKVPolicy",
    "DefensiveKVPolicy",
    "FullPolicy",
    "H2OPolicy",
    "KeyDiffPolicy",
    "KnormPolicy",
    "LocalPolicy",
    "RKVPolicy",
    "RandomPolicy",
    "SnapKVEveryPolicy",
    "SnapKVPolicy",
    "StreamingLLMPolicy",
    "TOVAPolicy",
    "VATPPolicy",
]
