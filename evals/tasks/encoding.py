"""From a prompt's text to token ids that fit the model."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from buzz.errors import ConfigError


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, chat: bool, limit: int, prefix: str = ""
) -> tuple[list[int], int]:
    """Token ids of a prompt, at most `limit`, and how many tokens were cut from its middle.

    As LongBench does, the two ends are joined as text and tokenized again; the chat template is
    applied afterwards and stays whole. So does `prefix`, the beginning of the answer.

    Raises:
        ConfigError: not even the template fits; the prompt is empty, or holds half a surrogate
            pair, which no tokenizer takes.
    """

    def tokens(text: str) -> list[int]:
        if not chat:
            return tokenizer(f"{text} {prefix}" if prefix else text)["input_ids"]
        messages = [{"role": "user", "content": text}]
        if prefix:
            messages.append({"role": "assistant", "content": prefix})
        kind = {"continue_final_message" if prefix else "add_generation_prompt": True}
        text = tokenizer.apply_chat_template(messages, tokenize=False, **kind)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("prompt", text[:40], "holds a lone surrogate; remove it") from error
    whole = tokens(text)
    if not whole:
        raise ConfigError("prompt", text[:40], "has no tokens; give a text")
    if len(whole) <= limit:
        return whole, 0
    body = tokenizer(text, add_special_tokens=False)["input_ids"]
    room = limit - (len(whole) - len(body))
    while (half := room // 2) > 0:
        ends = body[:half], body[-half:]
        cut = tokens("".join(tokenizer.decode(end, skip_special_tokens=True) for end in ends))
        if not cut:
            break
        if len(cut) <= limit:
            return cut, len(whole) - len(cut)
        room -= len(cut) - limit
    raise ConfigError("model.max_length", limit, "leaves no room for the prompt")
