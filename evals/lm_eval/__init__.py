"""The bridge to lm-evaluation-harness: importing it registers the model `buzz` there."""

from evals.lm_eval.model import EvictionLM, main

__all__ = ["EvictionLM", "main"]
