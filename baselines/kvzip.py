"""KVzip (arXiv 2505.23416): keeps the entries that the model attends to repeat the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from baselines.ranking import PromptPolicy
from buzz.policy import register

FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"
LEAD = 8  # last tokens of the chunk before, which the request for a later chunk names


@register()
@dataclass(frozen=True, kw_only=True)
class KVzipPolicy(PromptPolicy):
    """Reads the prompt a second time, and keeps the entries of the highest attention in that pass.

    As NVIDIA/kvpress (8bb29b9c) `kvzip_press`, where the heads of a layer, or all heads, share a
    capacity: here each KV head has its own, so that memory is really freed. There, the beginning of
    a chat template is never scored; here the whole prompt is. Before the second pass nothing is
    evicted.

    Args:
        capacity: prompt entries kept; none is protected.
        chunk: tokens repeated at a time.
    """

    needs_repetition: ClassVar[bool] = True

    chunk: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(LEAD, "chunk")

    def repetitions(self, prompt: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
        """The chunks alone, without a request: see :meth:`for_tokenizer` and :meth:`asking`."""
        for start in range(0, len(prompt), self.chunk):
            end = min(start + self.chunk, len(prompt))
            yield start, end, list(prompt[start:end])

    def for_tokenizer(self, tokenizer: Any) -> KVzipPolicy:
        """Adds requests in words, followed by the end of a user's turn in the chat template."""
        suffix, mark = "\n", "Repeat this."
        if tokenizer.chat_template is not None:
            message = [{"role": "user", "content": mark}]
            suffix = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, tokenize=False
            ).rpartition(mark)[2]
        texts = (FIRST, LATER, suffix)
        return self.asking(*(tokenizer.encode(x, add_special_tokens=False) for x in texts))

    def asking(
        self, first: Sequence[int], later: Sequence[int], suffix: Sequence[int]
    ) -> KVzipPolicy:
        """Adds token ids: before the first chunk, before later ones, between these and a chunk."""
        own = {"first": first, "later": later, "suffix": suffix}
        return _Asking(**{**vars(self), **own})


@dataclass(frozen=True, kw_only=True)
class _Asking(KVzipPolicy):
    """With the token ids of the requests for a chunk."""

    first: Sequence[int]
    later: Sequence[int]
    suffix: Sequence[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("first", "later", "suffix"):  # lists, where they were read from a file
            object.__setattr__(self, field, tuple(getattr(self, field)))

    def repetitions(self, prompt: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
        for start, end, chunk in super().repetitions(prompt):
            lead = prompt[max(0, start - LEAD) : start]
            ask = [*self.later, *lead] if start else [*self.first]
            yield start, end, [*ask, *self.suffix, *chunk]
