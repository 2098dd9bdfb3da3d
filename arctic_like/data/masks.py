"""Which tokens are trained, from spans of characters; and the tokenizer's batch call behind it.

**A token is trained when it holds any character of a span.** So a token that straddles the border
between a header and an answer is trained: without it the first character of the answer would never
be learned. It is what transformers' own `return_assistant_tokens_mask` does. Such tokens are
counted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from arctic_like.data.rendering import Span
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

_PROBE = "Hello, world!  Größe\n\n<think>42</think> 你好 🙂\t end "


class TextEncoder:
    """A copy of a fast tokenizer's core that never cuts and never pads.

    Raises RecipeError for a tokenizer without one, which cannot say which characters a token holds.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise RecipeError(
                Problem(
                    f"{type(tokenizer).__name__} is a slow tokenizer, which cannot say which "
                    "characters a token holds",
                    place="tokenizer",
                    hint="name a tokenizer that has a tokenizer.json",
                )
            )
        from tokenizers import Tokenizer

        description = json.loads(tokenizer.backend_tokenizer.to_str())
        # otherwise spaces at the border of a token lie outside its range, and so in no token's
        description["post_processor"] = _untrimmed(description.get("post_processor"))
        self._core: Any = Tokenizer.from_str(json.dumps(description))
        self._core.no_padding()
        self._core.no_truncation()
        self._core.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens
        expected = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        if self._core.encode(_PROBE, add_special_tokens=False).ids != list(expected):
            raise RecipeError(
                Problem(
                    f"{type(tokenizer).__name__} tokenises otherwise than the tokenizer.json in it",
                    place="tokenizer",
                    hint="name a tokenizer that is one of the `tokenizers` library alone",
                )
            )

    def __call__(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Any]:
        """The encodings of some texts, by all threads of the `tokenizers` library."""
        encodings: list[Any] = self._core.encode_batch(
            list(texts), add_special_tokens=add_special_tokens
        )
        return encodings


def _untrimmed(part: Any) -> Any:
    """A part of a tokenizer.json with every `trim_offsets` off; tokens do not depend on it."""
    if isinstance(part, dict):
        return {
            key: False if key == "trim_offsets" else _untrimmed(value)
            for key, value in part.items()
        }
    return [_untrimmed(entry) for entry in part] if isinstance(part, list) else part


@dataclass(frozen=True)
class Mask:
    """trained: (tokens,) uint8. straddling: tokens that hold characters on both sides of a span's
    start."""

    trained: NDArray[np.uint8]
    straddling: int


def token_mask(encoding: Any, spans: Sequence[Span]) -> Mask:
    """Which tokens of an encoding hold a character of one of the spans.

    encoding: `tokenizers.Encoding` of the text that the spans are of. Raises ValueError where a
    span has characters but no token.
    """
    trained = np.zeros(len(encoding), dtype=np.uint8)
    straddling = 0
    for start, end in spans:
        if start == end:
            continue
        first, last = first_token(encoding, start, end), _last_token(encoding, start, end)
        if first is None or last is None:
            raise ValueError(f"no token holds the characters {start} to {end}")
        straddling += encoding.token_to_chars(first)[0] < start
        trained[first : last + 1] = 1
    return Mask(trained, straddling)


def first_token(encoding: Any, start: int, end: int) -> int | None:
    """The first token with a character at or after `start`; None if there is none before `end`.

    A normaliser may have removed characters, which then are in no token.

    encoding: `tokenizers.Encoding`.
    """
    for at in range(start, end):
        token = encoding.char_to_token(at)
        if token is not None:
            return int(token)
    return None


def _last_token(encoding: Any, start: int, end: int) -> int | None:
    """The last token with a character before `end`; None if there is none after `start`."""
    for at in range(end - 1, start - 1, -1):
        token = encoding.char_to_token(at)
        if token is None:
            continue
        # the bytes of one character may lie in several tokens, of which this is the first
        while token + 1 < len(encoding) and encoding.token_to_chars(token + 1)[0] <= at:
            token += 1
        return int(token)
    return None
