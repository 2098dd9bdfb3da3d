"""Skeletons: one rendering that gives the turns of all conversations of the same structure.

A *skeleton* is the rendering of a conversation whose contents are sentinels, so all other text in
it is the template's own. What the template strips off a content is seen from a second rendering,
with white space around the sentinels. If the contents of a conversation, stripped that way and
filled into the skeleton, make up its real rendering **to the letter**, every place follows by
addition. If not (the template looks into a content, writes one as JSON, …), the skeleton says
nothing and another way must be found.

The structure: roles, and whether an answer has its thoughts in `<think>…</think>` before it or
under a key of their own, which are pieces for themselves, as templates write them otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

from arctic_like.data.rendering import Renderer
from arctic_like.data.shapes import Message, RowError
from arctic_like.data.turns import Probe, Turn, TurnFinder, Unclear, unused

_KEPT = 4096
_OPEN, _CLOSE = "<think>", "</think>"
_REASONING = ("reasoning_content", "thinking", "reasoning")

# white space that no template writes itself, so what is left of it is told from what stands beside
_LEFT, _RIGHT = "\n\u2001\n", "\n\u2002\n"
_Strip = Callable[[str], str] | None
_LEFT_STRIPS: dict[str, _Strip] = {
    _LEFT: None,
    _LEFT[1:]: lambda text: text.lstrip("\n"),
    "": str.lstrip,
}
_RIGHT_STRIPS: dict[str, _Strip] = {
    _RIGHT: None,
    _RIGHT[:-1]: lambda text: text.rstrip("\n"),
    "": str.rstrip,
}

Structure = tuple[tuple[str, str], ...]
"""(role, kind) of each message; kind: "" for a plain content, "<think>", or the key of its
thoughts."""


_Place = tuple[int, int]
"""A place in a skeleton: (segment, so many characters behind its begin)."""


@dataclass(frozen=True)
class _Skeleton:
    """A rendering taken apart: segment 0, piece `order[0]`, segment 1, …

    segments: the template's text. order: which piece stands between two segments. strips: what is
    stripped off each. turns: message → start, stop and end.
    """

    segments: list[str]
    order: list[int]
    strips: list[tuple[_Strip, _Strip]]
    turns: dict[int, tuple[_Place, _Place, _Place]]


class Skeletons:
    """The skeletons of a template, made when they are first needed."""

    def __init__(self, render: Renderer, find: TurnFinder) -> None:
        self._render = render
        self._find = find
        self._kept: dict[Structure, _Skeleton | None] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": {}}

    def turns(self, text: str, messages: Sequence[Message]) -> dict[int, Turn] | None:
        """Assistant's message → its turn in `text`, the rendering of `messages`; None where the
        skeleton does not make up the text."""
        taken = _taken_apart(messages)
        if taken is None:
            return None
        structure, pieces = taken
        if structure not in self._kept:
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            self._kept[structure] = self._made(structure, len(pieces))
        skeleton = self._kept[structure]
        return None if skeleton is None else _filled(skeleton, text, pieces)

    def _made(self, structure: Structure, count: int) -> _Skeleton | None:
        try:
            signs = list(islice(unused([]), count))
            if len(signs) < count:
                return None
            messages, own = _put_together(structure, signs)
            text = self._render(messages)
            segments, order = _split(text, signs)
            padded, again = _split(
                self._render(_put_together(structure, [_LEFT + s + _RIGHT for s in signs])[0]),
                signs,
            )
            if again != order:
                return None
            strips = _strips(segments, padded)
            answers = [n for n, (role, _) in enumerate(structure) if role == "assistant"]
            found = self._find(Probe(messages, own), text, answers, tools=None)
        except (Unclear, RowError):
            return None
        if strips is None:
            return None
        begins = list(accumulate((len(part) + 1 for part in segments), initial=0))

        def place(at: int) -> _Place:
            segment = max(n for n in range(len(segments)) if begins[n] <= at)
            return segment, at - begins[segment]

        turns = {n: (place(t.start), place(t.stop), place(t.end)) for n, t in found.items()}
        return _Skeleton(segments, order, strips, turns)


def _taken_apart(messages: Sequence[Message]) -> tuple[Structure, list[str]] | None:
    """The structure of a conversation and its pieces; None where a content is not plain text."""
    structure, pieces = [], []
    for message in messages:
        role, content = message["role"], message.get("content")
        if not isinstance(content, str) or "tool_calls" in message:
            return None
        kind = ""
        if role == "assistant":
            kind = next((key for key in _REASONING if message.get(key) is not None), "")
            if kind:
                if not isinstance(message[kind], str):
                    return None
                pieces.append(message[kind])
            elif content.startswith(_OPEN) and _CLOSE in content:
                kind = _OPEN
                thought, _, content = content[len(_OPEN) :].partition(_CLOSE)
                pieces.append(thought)
        structure.append((role, kind))
        pieces.append(content)
    return tuple(structure), pieces


def _put_together(
    structure: Structure, pieces: Sequence[str]
) -> tuple[list[Message], list[list[str]]]:
    """A conversation of a structure, and which pieces each of its messages has."""
    messages: list[Message] = []
    own = []
    at = 0
    for role, kind in structure:
        mine = list(pieces[at : at + (2 if kind else 1)])
        at += len(mine)
        if kind == _OPEN:
            messages.append({"role": role, "content": f"{_OPEN}{mine[0]}{_CLOSE}{mine[1]}"})
        else:
            thoughts = {kind: mine[0]} if kind else {}
            messages.append({"role": role, "content": mine[-1], **thoughts})
        own.append(mine)
    return messages, own


def _split(text: str, signs: list[str]) -> tuple[list[str], list[int]]:
    """(the text between the sentinels, which sentinel stands where)."""
    if not signs:
        return [text], []
    numbers = {sign: number for number, sign in enumerate(signs)}
    parts = re.split(f"([{''.join(signs)}])", text)
    return parts[::2], [numbers[sign] for sign in parts[1::2]]


def _strips(segments: list[str], padded: list[str]) -> list[tuple[_Strip, _Strip]] | None:
    """What is stripped off the left and right of each piece; None if something else is."""
    left: list[_Strip] = []
    right: list[_Strip] = []
    last = len(segments) - 1
    for number, (plain, wide) in enumerate(zip(segments, padded, strict=True)):
        fits = [
            (of_the_last, of_the_next)
            for of_the_last in (_RIGHT_STRIPS if number else ("",))
            for of_the_next in (_LEFT_STRIPS if number < last else ("",))
            if of_the_last + plain + of_the_next == wide
        ]
        if len(fits) != 1:
            return None
        if number:
            right.append(_RIGHT_STRIPS[fits[0][0]])
        if number < last:
            left.append(_LEFT_STRIPS[fits[0][1]])
    return list(zip(left, right, strict=True))


def _filled(skeleton: _Skeleton, text: str, pieces: list[str]) -> dict[int, Turn] | None:
    # once a conversation, so it counts every microsecond
    segments = skeleton.segments
    filled = [segments[0]]
    begins = [0]
    at = len(segments[0])
    for place, number in enumerate(skeleton.order):
        piece = pieces[number]
        left, right = skeleton.strips[place]
        if left is not None:
            piece = left(piece)
        if right is not None:
            piece = right(piece)
        segment = segments[place + 1]
        filled += (piece, segment)
        at += len(piece)
        begins.append(at)
        at += len(segment)
    if at != len(text) or "".join(filled) != text:
        return None
    return {
        number: Turn(begins[a] + start, begins[b] + stop, begins[c] + end)
        for number, ((a, start), (b, stop), (c, end)) in skeleton.turns.items()
    }
