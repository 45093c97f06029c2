"""The methods that BUZZ is compared with, each in a file of its own."""

from baselines.full import FullPolicy
from baselines.h2o import H2OPolicy
from baselines.local import LocalPolicy
from baselines.snapkv import SnapKVPolicy
from baselines.streaming_llm import StreamingLLMPolicy
from baselines.tova import TOVAPolicy

__all__ = [
    "FullPolicy",
    "H2OPolicy",
    "LocalPolicy",
    "SnapKVPolicy",
    "StreamingLLMPolicy",
    "TOVAPolicy",
]
