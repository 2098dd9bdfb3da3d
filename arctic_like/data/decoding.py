"""Tokens → text with the masks kept: which characters are trained, and which are special tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"
_LONGEST = 8
"""Tokens that may make up one character; a byte each is four, and bytes that make none must end."""


@dataclass(frozen=True)
class Span:
    """A stretch of text of one kind."""

    text: str
    trained: bool
    special: bool = False
    """One special token, by its name."""


class TokenText:
    """The text of tokens, in spans. A character of several tokens is shown whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special: dict[int, str] = {
            **{int(token): str(entry) for token, entry in added.items() if entry.special},
            **dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)),
        }
        """Token → name of every special token."""
        self._decode = _decoder(tokenizer)

    def spans(self, tokens: Sequence[int], trained: Sequence[bool]) -> list[Span]:
        """tokens, trained: of one document, one value a token. Spans of one kind are joined."""
        joined: list[Span] = []
        for span in self._pieces(tokens, trained):
            last = joined[-1] if joined else None
            if last and not (span.special or last.special) and span.trained == last.trained:
                joined[-1] = Span(last.text + span.text, span.trained)
            elif span.text:
                joined.append(span)
        return joined

    def _pieces(self, tokens: Sequence[int], trained: Sequence[bool]) -> Iterator[Span]:
        start = 0
        for at in range(len(tokens)):
            token = int(tokens[at])
            if token in self.special:
                yield from self._plain(tokens, trained, start, at)
                yield Span(self.special[token], bool(trained[at]), special=True)
                start = at + 1
        yield from self._plain(tokens, trained, start, len(tokens))

    def _plain(
        self, tokens: Sequence[int], trained: Sequence[bool], start: int, stop: int
    ) -> Iterator[Span]:
        """Tokens between two special ones.

        What a token adds to a text can depend on the one before it (a leading space that only the
        first of a text loses), so each is decoded behind its predecessors, and what is new counts.
        """
        before = read = start
        for at in range(start, stop):
            told = self._decode(tokens[before:read])
            text = self._decode(tokens[before : at + 1])
            if not text.startswith(told):
                told, text = "", self._decode(tokens[read : at + 1])
            unfinished = text.endswith(_UNFINISHED)
            ends = at + 1 == stop or bool(trained[at]) != bool(trained[at + 1])
            if unfinished and not ends and at + 1 - read < _LONGEST:
                continue
            yield Span(text[len(told) :], bool(trained[at]))
            # what did not become a character is no start for the next one
            before, read = (at + 1 if unfinished else read), at + 1


def _decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is not None:
        return lambda tokens: str(core.decode(list(tokens), skip_special_tokens=False))
    return lambda tokens: str(
        tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    )
