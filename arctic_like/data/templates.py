"""A conversation as text, and which characters of it are trained: exact, or refused.

A turn's span runs from the end of its header, where generation begins, to the end of its
end-of-turn token. Where the template has `{% generation %}` marks, they say what of it is trained.
Turns are found in the rendered text, by one of two ways that are each proved by the text itself:
a skeleton that the contents fill in to the letter (`skeletons`), which costs an addition, or
sentinels between the characters of the conversation (`insertions`), which cost some renderings
more. `turns` says what they have in common. A conversation for which neither holds is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arctic_like.data import insertions
from arctic_like.data.base import TrainOn
from arctic_like.data.rendering import Renderer, Span
from arctic_like.data.shapes import Message, RowError
from arctic_like.data.skeletons import Skeletons
from arctic_like.data.turns import Turn, TurnFinder, Unclear

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the spans in it that are trained: characters, ordered, disjoint.

    endless: answers behind which the template writes no token that could end them.
    """

    text: str
    spans: list[Span]
    endless: int = 0


class ChatTemplate:
    """The chat template of a tokenizer. Picklable.

    Raises RecipeError where the tokenizer has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.render = Renderer(tokenizer)
        names = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        names |= {tokenizer.eos_token} if tokenizer.eos_token else set()
        # white space ends no turn, though some vocabularies hold runs of it as added tokens
        ordered = sorted((n for n in names if n.replace("▁", "").strip()), key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
        self._find = TurnFinder(self.render, self._tokens)
        self._skeletons = Skeletons(self.render, self._find)

    def trained(
        self,
        messages: Sequence[Message],
        *,
        tools: list[Any] | None = None,
        train_on: TrainOn = "assistant",
        end_of_turn: bool = True,
    ) -> Rendered:
        """The text and what is trained of it.

        train_on: every answer, the last one, or all of the text; a message's `train` goes before
        it: true (its turn), false (nothing of it), or stretches `[start, stop]` in characters of
        its content, which take the end-of-turn token along where they reach the content's end.
        end_of_turn: off leaves the tokens that end answers untrained.

        Raises RowError where the template refuses the conversation, or where the spans cannot be
        exact.
        """
        wishes = [message.get("train") for message in messages]
        plain = list(messages)
        if any("train" in message for message in messages):
            plain = [{k: v for k, v in m.items() if k != "train"} for m in messages]
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        stated = any(wish is not None for wish in wishes)
        if train_on == "all" and end_of_turn and not stated:
            text = self.render(plain, tools=tools)
            return Rendered(text, [(0, len(text))] if text else [])
        if self.render.marked and train_on == "assistant" and end_of_turn and not stated:
            text, spans = self._marks(plain, tools)
            return Rendered(text, spans, self._endless(text, spans))
        conversation = _Conversation(self, plain, tools)
        chosen = _wanted(wishes, answers, train_on)
        try:
            if train_on == "all":
                spans = conversation.all_but(wishes, answers, end_of_turn=end_of_turn)
                return Rendered(conversation.text, spans)
            return conversation.only(wishes, chosen, answers, end_of_turn=end_of_turn)
        except Unclear as reason:
            raise _refused(conversation.text, reason) from None

    def _marks(
        self, messages: Sequence[Message], tools: list[Any] | None
    ) -> tuple[str, list[Span]]:
        text, spans = self.render.marks(messages, tools=tools)
        if any(not 0 <= start <= end <= len(text) for start, end in spans):
            raise RowError("gives the template's generation marks no place in the text")
        return text, [(start, end) for start, end in sorted(spans) if start < end]

    def _endless(self, text: str, spans: list[Span]) -> int:
        ends = {match.end() for match in self._tokens.finditer(text)}
        return sum(1 for start, end in spans if len(text[start:end].rstrip()) + start not in ends)

    def _turns(
        self,
        text: str,
        messages: Sequence[Message],
        wanted: Sequence[int],
        tools: list[Any] | None,
    ) -> dict[int, Turn]:
        if tools is None:
            found = self._skeletons.turns(text, messages)
            if found is not None and all(number in found for number in wanted):
                return found
        return insertions.find_turns(self.render, self._find, text, messages, wanted, tools=tools)


class _Conversation:
    """One conversation, rendered: `only` and `all_but` say which of its characters are trained."""

    def __init__(
        self, template: ChatTemplate, messages: list[Message], tools: list[Any] | None
    ) -> None:
        self.template = template
        self.messages = messages
        self.tools = tools
        self.marks: list[Span] | None = None
        if template.render.marked:
            self.text, self.marks = template._marks(messages, tools)
        else:
            self.text = template.render(messages, tools=tools)

    def only(
        self, wishes: list[Any], chosen: list[int], answers: list[int], *, end_of_turn: bool
    ) -> Rendered:
        """The turns of the chosen messages, or the stretches of them that are wished for."""
        if not chosen:
            return Rendered(self.text, [])
        turns = self.template._turns(self.text, self.messages, chosen, self.tools)
        parts = self._stretches({n: wishes[n] for n in chosen if isinstance(wishes[n], list)})
        spans = []
        for number in chosen:
            turn = turns[number]
            if number in parts:
                spans += parts[number]
                if end_of_turn and _to_the_end(wishes[number], self.messages[number]):
                    spans.append((turn.stop, turn.end))
                continue
            end = turn.end if end_of_turn else turn.stop
            whole = (turn.start, end)
            spans += self._marked(whole) if number in answers else [whole]
        endless = sum(turns[n].stop == turns[n].end for n in chosen if n in answers)
        return Rendered(self.text, _joined(spans), endless)

    def all_but(self, wishes: list[Any], answers: list[int], *, end_of_turn: bool) -> list[Span]:
        """The whole text without the messages that are wished away and, it may be, the ends of
        answers."""
        lists = {n: wish for n, wish in enumerate(wishes) if isinstance(wish, list)}
        out = [n for n, wish in enumerate(wishes) if wish is False or n in lists]
        looked_at = sorted({*out, *(() if end_of_turn else answers)})
        if not looked_at:
            return [(0, len(self.text))]
        turns = self.template._turns(self.text, self.messages, looked_at, self.tools)
        holes = [(turns[n].start, turns[n].end) for n in out]
        if not end_of_turn:
            holes += [(turns[n].stop, turns[n].end) for n in answers]
        kept = _joined([s for spans in self._stretches(lists).values() for s in spans])
        if end_of_turn:
            kept += [
                (turns[n].stop, turns[n].end)
                for n, wish in lists.items()
                if _to_the_end(wish, self.messages[n])
            ]
        return _joined([*_without((0, len(self.text)), _joined(holes)), *kept])

    def _stretches(self, wanted: Mapping[int, Sequence[Span]]) -> dict[int, list[Span]]:
        if not wanted:
            return {}
        return insertions.find_stretches(
            self.template.render, self.text, self.messages, wanted, tools=self.tools
        )

    def _marked(self, span: Span) -> list[Span]:
        """What of a turn the template marks; all of it where it has no marks."""
        if self.marks is None:
            return [span]
        cut = ((max(a, span[0]), min(b, span[1])) for a, b in self.marks)
        return [(start, end) for start, end in cut if start < end]


def _wanted(wishes: list[Any], answers: list[int], train_on: TrainOn) -> list[int]:
    """The messages of which something is trained."""
    usual = answers[-1:] if train_on == "last_assistant" else answers
    return [n for n, wish in enumerate(wishes) if (n in usual if wish is None else bool(wish))]


def _to_the_end(stretches: Sequence[Span], message: Message) -> bool:
    return any(stop == len(message["content"]) for _, stop in stretches)


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Spans in order; those that touch or overlap as one, empty ones left out."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if start >= end:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def _without(span: Span, holes: Sequence[Span]) -> list[Span]:
    """What is left of a span; the holes are in order and disjoint."""
    left, at = [], span[0]
    for start, end in holes:
        left.append((at, start))
        at = end
    return [*left, (at, span[1])]


def _refused(text: str, reason: Unclear) -> RowError:
    shown = text if len(text) <= 200 else f"{text[:140]} … {text[-50:]}"
    return RowError(
        f"cannot be masked exactly with this chat template: {reason}. The sample: {shown!r}",
        hint="put {% generation %} marks into the template around what the assistant writes, or "
        "set data.train_on: all",
    )
