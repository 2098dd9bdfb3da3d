"""Where a message's turn begins and ends in a rendered conversation: exact, or unclear.

The conversation is rendered with *sentinels* in it: characters of Unicode's private planes that
stand nowhere else, in place of the contents (`skeletons`) or between their characters
(`insertions`). So it is known of every place in the text which message wrote it, and nothing of
what people wrote is searched for.

- **A turn starts where generation begins.** The conversation up to the message is rendered with
  `add_generation_prompt`; what this writes behind the last sentinel must be what the whole
  conversation has behind the same sentinel. A prompt that goes on with a prefill, such as `<think>`,
  counts as far as the text follows it.
- **A turn ends with its end-of-turn token:** the first token behind the last sentinel of the
  message, where the conversation up to and with the message, rendered by itself, has it too. Where
  the last message ends otherwise than those in the middle (`<|return|>` and `<|end|>`), what stands
  before a generation prompt says how one in the middle ends. The start of the next header is thus
  never taken for an end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from arctic_like.data.rendering import Renderer
from arctic_like.data.shapes import Message, RowError

PRIVATE = range(0xF0000, 0xFFFFE)
"""Supplementary private use area A, of which the sentinels are."""

_SENTINEL = re.compile(f"[{chr(PRIVATE[0])}-{chr(PRIVATE[-1])}]")


class Unclear(Exception):
    """The template does not show where a turn begins or ends; says why."""


@dataclass(frozen=True)
class Turn:
    """A message's turn in a text, as characters.

    start: where it begins to be written; of others than the assistant, its first sentinel. stop:
    where its end-of-turn token begins. end: behind that token; equal to `stop` where there is none.
    """

    start: int
    stop: int
    end: int


@dataclass(frozen=True)
class Probe:
    """A conversation with sentinels. own: the sentinels of each message, in its order."""

    messages: list[Message]
    own: list[list[str]]


class TurnFinder:
    """Finds turns in probes.

    tokens: matches every added token of the tokenizer.
    """

    def __init__(self, render: Renderer, tokens: re.Pattern[str]) -> None:
        self.render = render
        self.tokens = tokens
        self._prompt: str | None = None

    def __call__(
        self, probe: Probe, text: str, wanted: Iterable[int], *, tools: list[object] | None
    ) -> dict[int, Turn]:
        """Message → its turn in `text`, the rendered probe, for each of the wanted messages.

        Raises Unclear, or RowError where the template refuses a part of the conversation.
        """
        return {number: _One(self, probe, text, number, tools).turn() for number in wanted}

    def generation_prompt(self) -> str:
        """What `add_generation_prompt` adds behind a user's message; empty if nothing."""
        if self._prompt is None:
            message = [{"role": "user", "content": chr(PRIVATE[0])}]
            without, prompted = self.render(message), self.render(message, generation=True)
            at = len(common_start(without, prompted))
            for text in (without, prompted):  # two tokens may begin alike
                cut = (token.start() for token in self.tokens.finditer(text) if token.end() > at)
                at = min(at, next(cut, at))
            if chr(PRIVATE[0]) in prompted[at:]:
                raise Unclear("the generation prompt changes what stands before it")
            self._prompt = prompted[at:]
        return self._prompt


class _One:
    """One message's turn in a rendered probe."""

    def __init__(
        self, finder: TurnFinder, probe: Probe, text: str, number: int, tools: list[object] | None
    ) -> None:
        self.finder = finder
        self.probe = probe
        self.text = text
        self.number = number
        self.tools = tools
        self.places = sentinels(text)
        self.message = probe.messages[number]
        self.own = sorted(self.places[s] for s in probe.own[number] if s in self.places)
        self.lead: tuple[str, str] | None = None
        """The sentinel before the turn, and what stands between it and the turn's start."""

    def turn(self) -> Turn:
        calls = bool(self.message.get("tool_calls"))
        if not self.own and (not calls or self._holds_tokens(shown=True)):
            raise Unclear(f"the template does not write message {self.number + 1} exactly once")
        start = self._start() if self.message["role"] == "assistant" else self.own[0]
        # a call whose name is written again with its result shows no place of its own
        behind = self.own[-1] + 1 if self.own else start
        stop, end = self._end(behind)
        if not start <= min(self.own, default=start) <= behind <= stop <= end <= len(self.text):
            raise Unclear(f"message {self.number + 1} is not written in one piece")
        return Turn(start, stop, end)

    def _holds_tokens(self, *, shown: bool) -> bool:
        """Whether an added token stands in what the message calls tools with.

        shown: look at strings with a sentinel too, behind which nothing of them follows.
        """
        return any(
            self.finder.tokens.search(_SENTINEL.sub("", text))
            for text in strings(self.message.get("tool_calls"))
            if shown or not _SENTINEL.search(text)
        )

    def _render(self, count: int, *, generation: bool = False) -> str:
        return self.finder.render(
            self.probe.messages[:count], tools=self.tools, generation=generation
        )

    def _start(self) -> int:
        if self.number == 0:
            return self._start_of_first()
        so_far = self._render(self.number, generation=True)
        shared = {s: at for s, at in sentinels(so_far).items() if s in self.places}
        anchor = max(shared, key=shared.__getitem__, default="")
        at = self.places[anchor] + 1 if anchor else 0
        prompt = so_far[shared[anchor] + 1 :] if anchor else so_far
        if self.probe.own[self.number][:1] and self.probe.own[self.number][0] in self.places:
            before = self.text[at : self.own[0]]
        else:  # the template leaves out how the message begins, so another one shows its header
            before = self._plain_header(anchor)
        header = prompt if before.startswith(prompt) else before
        if not prompt.startswith(header) or not self.text.startswith(header, at):
            raise Unclear(
                f"turn {self.number + 1} begins with {_short(before)}, its generation prompt is "
                f"{_short(prompt)}"
            )
        self.lead = (anchor, header)
        return at + len(header)  # the prompt may go on with a prefill

    def _plain_header(self, anchor: str) -> str:
        """What stands between the anchor and the message if all that it says is one sentinel."""
        plain = next(unused([self.text, *chain.from_iterable(self.probe.own)]), "")
        messages = list(self.probe.messages)
        messages[self.number] = {"role": self.message["role"], "content": plain}
        try:
            text = self.finder.render(messages, tools=self.tools)
        except RowError:  # a tool's result needs the call before it
            text = self.finder.render(messages[: self.number + 1], tools=self.tools)
        places = sentinels(text)
        if plain not in places or (anchor and anchor not in places):
            raise Unclear(f"the template does not write message {self.number + 1} exactly once")
        return text[places[anchor] + 1 if anchor else 0 : places[plain]]

    def _start_of_first(self) -> int:
        """Nothing stands before it, so the generation prompt is a user's message's."""
        if not self.own:
            raise Unclear("it begins with a call of a tool that shows no place of its own")
        prompt = self.finder.generation_prompt()
        before = self.text[: self.own[0]]
        if before.endswith(prompt):
            return self.own[0]
        # as a turn in the middle it may be written without a prefill
        user = {"role": "user", "content": chr(PRIVATE[-1])}
        middle = self.finder.render([self.message, user], tools=self.tools)
        at = sentinels(middle).get(self.text[self.own[0]], 0)
        if middle[:at].endswith(prompt) and before.startswith(middle[:at]):
            return at
        raise Unclear("it begins with the assistant, and the header has no clear end")

    def _end(self, behind: int) -> tuple[int, int]:
        """(where the end-of-turn token begins, where it ends); `behind` what the message says."""
        following = min((at for at in self.places.values() if at >= behind), default=None)
        after = self.text[behind:following]
        last = self.number == len(self.probe.messages) - 1
        alone = self.text[behind:] if last else self._behind(self._render(self.number + 1))
        calls = bool(self.message.get("tool_calls"))
        found = self._token_in(common_start(alone, after), alone, after, calls=calls)
        if calls and (found is None or self._holds_tokens(shown=False)):
            raise Unclear(f"the calls of message {self.number + 1} have no clear end-of-turn token")
        if found is None:
            return behind, behind
        return behind + found[0], behind + found[1]

    def _behind(self, text: str) -> str:
        """What stands behind the message in a rendering of the conversation up to it."""
        places = sentinels(text)
        if self.own:
            at, lead = places.get(self.text[self.own[-1]]), ""
        else:
            anchor, lead = self.lead or ("", "")
            at = places.get(anchor)
        if at is None or not text.startswith(lead, at + 1):
            raise Unclear(f"message {self.number + 1} is written otherwise when it is the last one")
        return text[at + 1 + len(lead) :]

    def _token_in(
        self, common: str, alone: str, after: str, *, calls: bool
    ) -> tuple[int, int] | None:
        if calls or (not self._pick(common, calls) and self.finder.tokens.search(alone)):
            # how it would end with another turn to come; the calls of tools may hold tokens of
            # their own, so there the last one ends the turn, but what closes the whole text must
            # not be taken for it
            try:
                ending = self._before_prompt()
            except RowError:
                ending = ""
            in_the_middle = self._pick(common_start(ending, after), calls)
            if in_the_middle and (calls or self.finder.tokens.match(alone, in_the_middle[0])):
                return in_the_middle
            if not calls:
                raise Unclear(
                    f"turn {self.number + 1} goes on with {_short(after)}, but ends with "
                    f"{_short(alone)} when it is the last one"
                )
        return self._pick(common, calls)

    def _before_prompt(self) -> str:
        """What stands between the message and the generation prompt of the next one."""
        prompted = self._behind(self._render(self.number + 1, generation=True))
        prompt = self.finder.generation_prompt()
        return prompted.removesuffix(prompt) if prompted.endswith(prompt) else ""

    def _pick(self, text: str, last: bool) -> tuple[int, int] | None:
        matches = list(self.finder.tokens.finditer(text))
        return matches[-1 if last else 0].span() if matches else None


def sentinels(text: str) -> dict[str, int]:
    """Where each private character stands that is in the text exactly once."""
    places: dict[str, int] = {}
    twice = set()
    for match in _SENTINEL.finditer(text):
        if match[0] in places:
            twice.add(match[0])
        places[match[0]] = match.start()
    return {sentinel: at for sentinel, at in places.items() if sentinel not in twice}


def strings(value: Any) -> Iterator[str]:
    """Every text in lists and maps, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def unused(texts: Iterable[str]) -> Iterator[str]:
    """Private characters that are in none of some texts, as long as there are any."""
    taken = set().union(*texts)
    return (chr(code) for code in PRIVATE[1:-1] if chr(code) not in taken)


def common_start(one: str, other: str) -> str:
    """The longest text that both begin with."""
    limit = min(len(one), len(other))
    if one[:limit] == other[:limit]:
        return one[:limit]
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return one[:low]


def _short(text: str) -> str:
    """A text as it may stand in an error."""
    return repr(text if len(text) <= 60 else f"{text[:40]} … {text[-15:]}")
