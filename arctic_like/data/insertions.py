"""Sentinels between the characters of a real conversation: turns where contents shape the text.

A sentinel is put before and behind what each message says. Without its sentinels, the rendering
must be the conversation's own **to the letter**, so they have changed nothing but where they stand;
each then shows where the characters on its two sides were written. A sentinel may change something:
white space is not stripped past it, and a template may ask how a content begins. So several ways of
placing them are tried, and a conversation for which none holds is refused.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from arctic_like.data.rendering import Renderer, Span
from arctic_like.data.shapes import Message, RowError
from arctic_like.data.turns import Probe, Turn, TurnFinder, Unclear, sentinels, strings, unused

_REASONING = ("reasoning_content", "thinking", "reasoning")
_CLOSE = "</think>"
_STRIPPED: dict[str, tuple[str | None, str | None]] = {
    "whole": ("", ""), "stripped": (None, None), "newlines": ("\n", "\n"),
    "left": (None, ""), "left newlines": ("\n", ""), "right": ("", None),
    "right newlines": ("", "\n"),
}  # fmt: skip
"""Way → what is stripped off the left and the right of a content; None is white space."""
_WAYS = ("whole", "stripped", "newlines", "behind thoughts", "behind thoughts, stripped", "inside")


def find_turns(
    render: Renderer,
    find: TurnFinder,
    text: str,
    messages: Sequence[Message],
    wanted: Sequence[int],
    *,
    tools: list[Any] | None,
) -> dict[int, Turn]:
    """The turns of some messages in `text`, the rendering of `messages`.

    Raises Unclear where no way of placing sentinels shows them.
    """
    reason = "the contents change what the template writes around them"
    for way in (*_WAYS, "each its own"):
        try:
            signs = _Signs(text, messages)
            if way in _WAYS:
                probe = _around(messages, signs, way, wanted)
            else:
                probe = _one_by_one(render, signs, text, messages, wanted, tools)
            written = render(probe.messages, tools=tools)
            if signs.without(written) != text:
                continue
            turns = find(probe, written, wanted, tools=tools)
        except (Unclear, RowError) as error:
            reason = str(error)
            continue
        places = signs.places(written)
        found = {
            number: Turn(
                *(at - bisect_left(places, at) for at in (turn.start, turn.stop, turn.end))
            )
            for number, turn in turns.items()
        }
        return _with_contents(render, text, messages, found, tools)
    raise Unclear(reason)


def _with_contents(
    render: Renderer,
    text: str,
    messages: Sequence[Message],
    turns: dict[int, Turn],
    tools: list[Any] | None,
) -> dict[int, Turn]:
    """Turns of others than the assistant start with their content: they have no generation prompt."""
    whole = {
        number: [(0, len(messages[number].get("content", "")))]
        for number in turns
        if messages[number]["role"] != "assistant"
    }
    if not whole:
        return turns
    spans = find_stretches(render, text, messages, whole, tools=tools)
    for number, found in spans.items():
        turn = turns[number]
        turns[number] = Turn(found[0][0] if found else turn.stop, turn.stop, turn.end)
    return turns


def find_stretches(
    render: Renderer,
    text: str,
    messages: Sequence[Message],
    wanted: Mapping[int, Sequence[Span]],
    *,
    tools: list[Any] | None,
) -> dict[int, list[Span]]:
    """Message → the characters of `text` that stretches of its content became.

    wanted: message → characters of its content. A stretch that the template does not write (an
    earlier turn's thoughts, say) is left out. Raises Unclear where sentinels do not show them.
    """
    return {
        number: _written(render, text, messages, number, stretches, tools)
        for number, stretches in wanted.items()
    }


def _written(
    render: Renderer,
    text: str,
    messages: Sequence[Message],
    number: int,
    stretches: Sequence[Span],
    tools: list[Any] | None,
) -> list[Span]:
    """The characters of `text` that stretches of one message's content became."""
    content = messages[number]["content"]

    def rendered(changed: str) -> str:
        before, after = messages[:number], messages[number + 1 :]
        return render([*before, {**messages[number], "content": changed}, *after], tools=tools)

    for way in _STRIPPED:
        signs = _Signs(text, messages)
        first, last = _bounds(content, way)
        at = [(min(max(at, first), last), signs.one()) for pair in stretches for at in pair]
        try:
            written = rendered(_with(content, at))
            # white space outside the sentinels must really not be written
            holds = way == "whole" or rendered(content[first:last]) == text
        except RowError:
            continue
        if holds and signs.without(written) == text:
            drawn = [sign for _, sign in at]
            return _read(signs, written, drawn, number)
    raise Unclear(f"message {number + 1} is written otherwise than it stands there")


def _read(signs: _Signs, written: str, drawn: list[str], number: int) -> list[Span]:
    """Where the sentinels of stretches, (start, stop) after (start, stop), stand."""
    places, unique = signs.places(written), sentinels(written)
    found: list[Span] = []
    for start, stop in zip(drawn[::2], drawn[1::2], strict=True):
        if not (start in written or stop in written):
            continue
        if start not in unique or stop not in unique:
            raise Unclear(f"a part that is trained of message {number + 1} is written in parts")
        first, last = unique[start], unique[stop]
        found.append((first - bisect_left(places, first), last - bisect_left(places, last)))
    return found


class _Signs:
    """Sentinels that stand nowhere in a conversation."""

    def __init__(self, text: str, messages: Sequence[Message]) -> None:
        self._free = unused([text, *strings(list(messages))])
        self._used: dict[int, None] = {}

    def one(self) -> str:
        """A sentinel that was not given out yet."""
        sign = next(self._free, None)
        if sign is None:
            raise Unclear("it uses too many private characters")
        self._used[ord(sign)] = None
        return sign

    def without(self, text: str) -> str:
        """A text without the sentinels that were given out."""
        return text.translate(self._used)

    def places(self, text: str) -> list[int]:
        """Where the sentinels that were given out stand, in order."""
        pattern = f"[{''.join(map(chr, self._used))}]" if self._used else "(?!)"
        return [match.start() for match in re.finditer(pattern, text)]


def _around(messages: Sequence[Message], signs: _Signs, way: str, wanted: Sequence[int]) -> Probe:
    """A conversation with sentinels around what each message says."""
    pairs = [_marked(m, signs, way, looked_at=n in wanted) for n, m in enumerate(messages)]
    return Probe([marked for marked, _ in pairs], [own for _, own in pairs])


def _one_by_one(
    render: Renderer,
    signs: _Signs,
    text: str,
    messages: Sequence[Message],
    wanted: Sequence[int],
    tools: list[Any] | None,
) -> Probe:
    """A conversation where each message has its sentinels the first way that changes nothing."""
    probe = Probe(list(messages), [[] for _ in messages])
    for number, message in enumerate(messages):
        for way in _WAYS:
            marked, own = _marked(message, signs, way, looked_at=number in wanted)
            changed = [*probe.messages[:number], marked, *probe.messages[number + 1 :]]
            if signs.without(render(changed, tools=tools)) == text:
                probe.messages[number], probe.own[number] = marked, own
                break
    return probe


def _marked(
    message: Message, signs: _Signs, way: str, *, looked_at: bool
) -> tuple[Message, list[str]]:
    """A message with sentinels around what it says, and these sentinels.

    looked_at: its own turn is wanted, so no sentinel may stand inside its content: the content may
    hold what looks like an end.
    """
    mine: list[str] = []
    changed = dict(message)
    answer = message["role"] == "assistant"
    thoughts = next((key for key in _REASONING if message.get(key) is not None), "")
    if answer and thoughts and isinstance(message[thoughts], str):
        changed[thoughts] = _put(message[thoughts], signs, mine, way, empty_too=False)
    content = message.get("content")
    calls = message.get("tool_calls")
    if isinstance(content, str) and way == "inside" and not (answer or looked_at):
        changed["content"] = _put_inside(content, signs, mine)
    elif isinstance(content, str):
        changed["content"] = _put(content, signs, mine, way, empty_too=not calls)
    if calls:
        changed["tool_calls"] = _in_calls(calls, signs, mine)
    return changed, mine


def _put(content: str, signs: _Signs, mine: list[str], way: str, *, empty_too: bool) -> str:
    """empty_too: templates ask whether something is there, so an empty content gets a sentinel only
    where nothing else shows the message's place."""
    first, last = _bounds(content, way)
    if first == last and not empty_too:
        return content
    if way.startswith("behind") and _CLOSE in content:
        mine.append(signs.one())  # that it is not written says that something stands before
    mine += [signs.one() for _ in range(1 if first == last else 2)]
    return _with(
        content, [(first, mine[-1])] if first == last else [(first, mine[-2]), (last, mine[-1])]
    )


def _put_inside(content: str, signs: _Signs, mine: list[str]) -> str:
    """Where a template may ask how a content begins and ends."""
    if len(content) < 2:
        return content
    mine.append(signs.one())
    return _with(content, [(len(content) // 2, mine[-1])])


def _in_calls(calls: Any, signs: _Signs, mine: list[str]) -> Any:
    """Calls of tools with sentinels around each name and behind each text of the arguments."""
    if not isinstance(calls, list):
        return calls
    marked = []
    for call in calls:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict):
            marked.append(call)
            continue
        changed = dict(inner)
        if isinstance(inner.get("name"), str):
            mine += [signs.one(), signs.one()]
            changed["name"] = mine[-2] + inner["name"] + mine[-1]
        if "arguments" in inner:
            changed["arguments"] = _behind(inner["arguments"], signs, mine)
        marked.append({**call, "function": changed} if "function" in call else changed)
    return marked


def _behind(value: Any, signs: _Signs, mine: list[str]) -> Any:
    if isinstance(value, str):
        mine.append(signs.one())
        return value + mine[-1]
    if isinstance(value, dict):
        return {key: _behind(item, signs, mine) for key, item in value.items()}
    if isinstance(value, list):
        return [_behind(item, signs, mine) for item in value]
    return value


def _bounds(content: str, way: str) -> Span:
    """Where the sentinels around a content stand in it: inside what is stripped off it."""
    if way in _STRIPPED:
        return _inside_strips(content, *_STRIPPED[way])
    if _CLOSE not in content or way == "inside":
        return _bounds(content, "whole" if way == "behind thoughts" else "stripped")
    at = content.rfind(_CLOSE) + len(_CLOSE)
    strips = ("\n", "") if way == "behind thoughts" else (None, None)
    first, last = _inside_strips(content[at:], *strips)
    return at + first, at + last


def _inside_strips(content: str, left: str | None, right: str | None) -> Span:
    """The bounds of a content without some characters on each side; None is white space."""
    first = len(content) - len(content.lstrip(left)) if left != "" else 0
    last = len(content.rstrip(right)) if right != "" else len(content)
    return first, max(first, last)


def _with(content: str, at: Sequence[tuple[int, str]]) -> str:
    """A content with sentinels before some of its characters; those at one place in their order."""
    parts, done = [], 0
    for place, sign in sorted(at, key=lambda pair: pair[0]):
        parts += [content[done:place], sign]
        done = place
    return "".join([*parts, content[done:]])
