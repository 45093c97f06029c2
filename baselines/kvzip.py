"""KVzip (arXiv 2505.23416): of the prompt, what the model attends to when it repeats it stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from baselines.ranking import PromptPolicy
from buzz.policy import register

FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"
LEAD = 8  # last tokens of the chunk before, which a later chunk is asked for by


@register()
@dataclass(frozen=True, kw_only=True)
class KVzipPolicy(PromptPolicy):
    """The prompt is read a second time, before anything of it is dropped.

    As NVIDIA/kvpress (8bb29b9c) `kvzip_press`, where a layer's heads, or all, share what is kept:
    here each KV head has its own capacity, so that memory is really freed. There a chat template's
    beginning is never judged; here all of the prompt is. Until it is judged, all is held.

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
        """Nothing asks for a chunk before :meth:`for_tokenizer` or :meth:`asking` say what."""
        for start in range(0, len(prompt), self.chunk):
            end = min(start + self.chunk, len(prompt))
            yield start, end, list(prompt[start:end])

    def for_tokenizer(self, tokenizer: Any) -> KVzipPolicy:
        """Asks in words; then comes what the chat template has behind a user's."""
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
        """Reads these ids before the first chunk, before later ones, and between them and it."""
        own = {"first": first, "later": later, "suffix": suffix}
        return _Asking(**{**vars(self), **own})


@dataclass(frozen=True, kw_only=True)
class _Asking(KVzipPolicy):
    """Token ids of what asks for a chunk."""

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
