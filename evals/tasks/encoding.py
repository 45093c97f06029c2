"""Turns a prompt's text into token ids that fit the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix

from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError


@dataclass(frozen=True)
class Encoded:
    """A prompt as token ids.

    Attributes:
        ids: its tokens.
        truncated: how many were cut from its middle.
        user: the user's text, after cutting.
        text: the user's text in the chat template, which was tokenized.
        prefix: the beginning of the answer, with which `text` ends.
        special: whether the tokenizer added its special tokens.
    """

    ids: list[int]
    truncated: int
    user: str
    text: str
    prefix: str
    special: bool

    def tokens_before(self, question: str, tokenizer: PreTrainedTokenizerBase) -> int:
        """How many of the first tokens come before the question and do not depend on it.

        The text before the question is tokenized alone, and the tokens that both have in common are
        counted. A token that joins the context's end with the question's beginning, such as white
        space between them, belongs to the question.

        Args:
            question: the end of the user's text.

        Returns:
            0 if the text no longer ends with the question.
        """
        # Templates may strip a message.
        question = question.strip()
        if not self.user.rstrip().endswith(question):
            return 0
        place = self.text.rfind(question, 0, len(self.text) - len(self.prefix))
        if place < 0:
            return 0
        alone = tokenizer(self.text[:place], add_special_tokens=self.special)["input_ids"]
        return len(commonprefix([alone, self.ids]))


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, chat: bool, limit: int, prefix: str = ""
) -> tuple[list[int], int]:
    """Token ids of a prompt, and how many were cut, see :func:`encode_prompt`."""
    encoded = encode_prompt(tokenizer, text, chat, limit, prefix)
    return encoded.ids, encoded.truncated


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, chat: bool, limit: int, prefix: str = ""
) -> Encoded:
    """Token ids of a prompt, at most `limit`: a prompt that is too long loses its middle.

    As in LongBench, the two ends are joined as text and tokenized again. The chat template is
    applied afterwards, so that it stays whole, as does `prefix`, the beginning of the answer.

    Raises:
        ConfigError: not even the template fits, or it refuses the prompt; the prompt is empty, or
            holds half a surrogate pair, which no tokenizer takes.
    """

    def encoded(user: str) -> Encoded:
        if not chat:
            whole = f"{user} {prefix}" if prefix else user
        else:
            messages = [{"role": "user", "content": user}]
            if prefix:
                messages.append({"role": "assistant", "content": prefix})
            whole = in_template(tokenizer, messages)
        ids = tokenizer(whole, add_special_tokens=not chat)["input_ids"]
        end = getattr(tokenizer, "eos_token", None)
        if end and ids[-1:] == [tokenizer.eos_token_id] and not whole.endswith(end):
            ids = ids[:-1]  # some tokenizers end every text; the answer has to continue it
        return Encoded(ids, 0, user, whole, prefix, not chat)

    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("prompt", text[:40], "holds a lone surrogate; remove it") from error
    whole = encoded(text)
    if not whole.ids:
        raise ConfigError("prompt", text[:40], "has no tokens; give a text")
    if len(whole.ids) <= limit:
        return whole
    body = tokenizer(text, add_special_tokens=False)["input_ids"]
    room = limit - (len(whole.ids) - len(body))
    while (half := room // 2) > 0:
        ends = body[:half], body[-half:]
        joined = "".join(tokenizer.decode(end, skip_special_tokens=True) for end in ends)
        cut = encoded(joined)
        if not cut.ids:
            break
        if len(cut.ids) <= limit:
            return replace(cut, truncated=len(whole.ids) - len(cut.ids))
        room -= len(cut.ids) - limit
    raise ConfigError("model.max_length", limit, "leaves no room for the prompt")


def in_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """Messages in the chat template, up to where the model continues.

    If the last message is the assistant's, the model continues that one.

    Raises:
        ConfigError: the template refuses the messages, or leaves one of them out.
    """
    goes_on = messages[-1]["role"] == "assistant"
    kind = {"continue_final_message" if goes_on else "add_generation_prompt": True}
    reason = "leaves out a message"
    try:
        whole = tokenizer.apply_chat_template([*messages], tokenize=False, **kind)
    except Exception as error:  # the template's code raises any kind
        whole, reason = None, f"says: {(str(error) or type(error).__name__).splitlines()[0]}"
    if whole is None or not all(message["content"].strip() in whole for message in messages):
        roles = ", ".join(message["role"] for message in messages)
        remedy = f"the model's template {reason} (of {roles}); write false, or take another model"
        raise ConfigError("task.chat_template", True, remedy)
    return whole
