"""Thoughts in answers: `<think>…</think>` blocks, and keys of their own."""

from __future__ import annotations

import re
from collections.abc import Sequence

from arctic_like.data.shapes import Message

_BLOCK = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
_EMPTY = re.compile(r"\s*<think>\s*</think>\s*")
_KEYS = ("reasoning_content", "thinking", "reasoning")


def without_thoughts(messages: Sequence[Message]) -> list[Message]:
    """The messages, the assistant's without `<think>…</think>` blocks, the white space behind them,
    and keys that hold thoughts. Stretches in `train` move along with the rest of their content.

    A block that is not closed stays.
    """
    return [_plain(m) if m["role"] == "assistant" else m for m in messages]


def past_empty_block(text: str, start: int, end: int) -> int:
    """Where the span from `start` to `end` goes on behind an empty block that it begins with."""
    match = _EMPTY.match(text, start, end)
    return match.end() if match else start


def _plain(message: Message) -> Message:
    plain = {key: value for key, value in message.items() if key not in _KEYS}
    content = message.get("content")
    if not isinstance(content, str):
        return plain
    blocks = [match.span() for match in _BLOCK.finditer(content)]
    if blocks:
        plain["content"] = _BLOCK.sub("", content)
        if isinstance(plain.get("train"), list):
            plain["train"] = [[_moved(at, blocks) for at in pair] for pair in plain["train"]]
    return plain


def _moved(at: int, blocks: Sequence[tuple[int, int]]) -> int:
    """Where the character `at` stands once the blocks are gone."""
    return at - sum(min(at, stop) - start for start, stop in blocks if start < at)
