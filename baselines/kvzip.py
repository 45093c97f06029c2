"""KVzip (arXiv 2505.23416): of the prompt, what the model attends to when it repeats it stays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from baselines.ranking import PromptPolicy
from buzz.policy import register

FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"
LEAD = 8  # last tokens of the chunk before, which a later chunk is asked for by


@register("kvzip")
@dataclass(frozen=True, kw_only=True)
class KVzipPolicy(PromptPolicy):
    """The ceiling: the prompt is read a second time, before anything of it is dropped.

    As NVIDIA/kvpress (8bb29b9c) `kvzip_press`, where a layer's heads, or all, share what is kept:
    here each KV head has its own capacity, so that memory is really freed. There a chat template's
    beginning is never judged; here all of the prompt is. Until it is judged, all is held.

    Args:
        capacity: prompt entries kept; none is protected.
        chunk: tokens repeated at a time.
        first, later, suffix: token ids of what asks for the first chunk, for a later one, and of
            what comes between that and the chunk; :meth:`for_tokenizer` sets them. Without them
            the bare chunk is repeated.
    """

    needs_repetition: ClassVar[bool] = True

    chunk: int = 2048
    first: tuple[int, ...] = ()
    later: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(LEAD, "chunk")
        for field in ("first", "later", "suffix"):  # lists, where they were read from a file
            object.__setattr__(self, field, tuple(getattr(self, field)))

    def repetitions(self, prompt: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
        for start in range(0, len(prompt), self.chunk):
            end = min(start + self.chunk, len(prompt))
            ask = [*self.later, *prompt[max(0, start - LEAD) : start]] if start else [*self.first]
            yield start, end, [*ask, *self.suffix, *prompt[start:end]]

    def for_tokenizer(self, tokenizer: Any) -> KVzipPolicy:
        """The suffix is what the tokenizer's chat template has behind a user's words."""
        suffix, mark = "\n", "Repeat this."
        if tokenizer.chat_template is not None:
            message = [{"role": "user", "content": mark}]
            suffix = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, tokenize=False
            ).rpartition(mark)[2]
        ids = (tokenizer.encode(text, add_special_tokens=False) for text in (FIRST, LATER, suffix))
        return dataclasses.replace(
            self, **dict(zip(("first", "later", "suffix"), ids, strict=True))
        )
