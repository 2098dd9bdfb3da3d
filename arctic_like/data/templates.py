"""Where in a rendered conversation stands what the assistant wrote: exact, or refused.

A turn's span runs from the end of its header, where generation begins, to the end of its
end-of-turn token. Where the template has `{% generation %}` marks, they say it. Otherwise it is
found by rendering with sentinels: characters of Unicode's private planes in place of the contents.

- A *skeleton* is the rendering of a sequence of roles with a sentinel for every content, so all
  other text in it is the template's own. If filling in the contents (as they are, or trimmed) gives
  the real rendering to the letter, every position follows by addition. One skeleton serves all
  conversations with the same roles.
- Where the template treats contents differently (a `</think>` in them, an empty one), the end of a
  content is found from what follows its sentinel in the otherwise real conversation, which must be
  how the real rendering ends.

In both the header is what stands between the previous content and the place of generation when the
conversation so far is rendered with `add_generation_prompt`. No text of a conversation is searched
for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arctic_like.data.shapes import Message, RowError
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_SENTINELS = range(0xF0000, 0xFFFFE)  # supplementary private use area A
_KEPT_SKELETONS = 4096
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the spans in it that are trained: characters, ordered, disjoint.

    endless: turns after which the template writes no token that could end them.
    """

    text: str
    spans: list[Span]
    endless: int = 0


@dataclass(frozen=True)
class _Turn:
    """An assistant's turn in a skeleton: characters of header before, and of end after its
    content."""

    message: int
    header: int
    end: int


@dataclass(frozen=True)
class _Skeleton:
    """segments: the template's text before each content, and after the last one."""

    segments: list[str]
    turns: list[_Turn]


class _Unclear(Exception):
    """The template does not show where a turn begins or ends; says why."""


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        try:
            self.source: str = tokenizer.get_chat_template()
        except ValueError:
            raise RecipeError(
                Problem(
                    "the tokenizer has no chat template, which conversations need",
                    place="tokenizer.chat_template",
                    hint="set tokenizer.chat_template, or name the tokenizer of an instruct model",
                )
            ) from None
        self.marked = _GENERATION.search(self.source) is not None
        self._variables = dict(tokenizer.special_tokens_map)
        names = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        names |= {tokenizer.eos_token} if tokenizer.eos_token else set()
        ordered = sorted(names, key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
        self._skeletons: dict[tuple[str, ...], _Skeleton | None] = {}

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text. Raises RowError where the template refuses it."""
        return self._render(messages, add_generation_prompt=add_generation_prompt)[0]

    def _render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        marks: bool = False,
    ) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [list(messages)],
                chat_template=self.source,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except (TemplateError, TypeError, KeyError, IndexError) as error:
            raise RowError(f"is refused by the chat template: {error}") from error
        return texts[0], [tuple(span) for span in spans[0]] if marks else []

    def trained(self, messages: Sequence[Message]) -> Rendered:
        """The text and what is trained of it: every assistant's turn without `train: false`.

        Raises RowError where the template refuses the conversation, or where the spans cannot be
        exact.
        """
        wanted = [
            number
            for number, message in enumerate(messages)
            if message["role"] == "assistant" and message.get("train", True)
        ]
        plain = [{k: v for k, v in message.items() if k != "train"} for message in messages]
        if self.marked:
            return self._by_marks(plain, wanted)
        text = self.render(plain)
        if not wanted:
            return Rendered(text, [])
        found = self._by_skeleton(text, plain)
        try:
            if found is None:
                found = self._by_contents(text, plain, wanted)
        except (_Unclear, RowError) as reason:
            shown = text if len(text) <= 400 else f"{text[:300]} … {text[-100:]}"
            raise RowError(
                f"cannot be masked exactly with this chat template: {reason}. Put "
                "{% generation %} marks into the template around what the assistant writes, or set "
                f"data.mask_inputs: false. The sample: {shown!r}"
            ) from None
        turns = [found[number] for number in wanted]
        spans = [(start, end) for start, end, _ in turns]
        return Rendered(text, spans, sum(1 for *_, closed in turns if not closed))

    def _by_marks(self, messages: list[Message], wanted: list[int]) -> Rendered:
        text, spans = self._render(messages, marks=True)
        turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if len(wanted) < len(turns):
            if len(spans) != len(turns):
                raise RowError(
                    f"has {len(turns)} assistant turns, but the template marks {len(spans)} "
                    "stretches, so `train: false` cannot be applied to one of them"
                )
            spans = [span for turn, span in zip(turns, spans, strict=True) if turn in wanted]
        if any(not 0 <= start <= end <= len(text) for start, end in spans):
            raise RowError("gives the template's generation marks no place in the text")
        return Rendered(text, [(start, end) for start, end in spans if start < end])

    # --- by skeleton: all contents replaced, one rendering for all conversations of the same roles

    def _by_skeleton(
        self, text: str, messages: list[Message]
    ) -> dict[int, tuple[int, int, bool]] | None:
        """Assistant's message → (start, end, has an end token), or None where contents change the
        template."""
        if any(message.keys() != {"role", "content"} for message in messages):
            return None
        roles = tuple(message["role"] for message in messages)
        if roles not in self._skeletons:
            if len(self._skeletons) >= _KEPT_SKELETONS:
                self._skeletons.clear()
            self._skeletons[roles] = self._skeleton(roles)
        skeleton = self._skeletons[roles]
        if skeleton is None:
            return None
        raw = [message["content"] for message in messages]
        for contents in (raw, [content.strip() for content in raw]):
            filled = [skeleton.segments[0]]
            for content, segment in zip(contents, skeleton.segments[1:], strict=True):
                filled += (content, segment)
            if "".join(filled) == text:
                return _places(skeleton, contents)
        return None

    def _skeleton(self, roles: tuple[str, ...]) -> _Skeleton | None:
        if len(roles) > len(_SENTINELS):
            return None
        sentinels = [chr(_SENTINELS[number]) for number in range(len(roles))]
        messages = [{"role": r, "content": s} for r, s in zip(roles, sentinels, strict=True)]
        try:
            segments = _split_at(self.render(messages), sentinels)
            turns = []
            for number, role in enumerate(roles):
                if role != "assistant":
                    continue
                header = self._header(messages, number, segments[number])
                end = self._end(messages, number, segments[number + 1])
                turns.append(_Turn(number, header, end))
        except (_Unclear, RowError):
            return None
        return _Skeleton(segments, turns)

    def _header(self, messages: list[Message], turn: int, before: str) -> int:
        """How much of `before`, the text between the previous content and this one, is header.

        Message `turn - 1` of `messages` has one sentinel as its content.
        """
        if turn == 0:
            prompt = self._generation_prompt()
            if not before.endswith(prompt):
                raise _Unclear("it begins with the assistant, and the header has no clear end")
            return len(before)
        previous = messages[turn - 1]["content"]
        so_far = self.render(messages[:turn], add_generation_prompt=True)
        header = _after(so_far, previous)
        if before.startswith(header):
            return len(header)
        if header.startswith(before):
            return len(before)  # the prompt goes on with a prefill, such as `<think>`
        raise _Unclear(f"the turn begins with {before!r}, its generation prompt is {header!r}")

    def _generation_prompt(self) -> str:
        message = [{"role": "user", "content": chr(_SENTINELS[0])}]
        without = self.render(message)
        with_prompt = self.render(message, add_generation_prompt=True)
        if not with_prompt.startswith(without):
            raise _Unclear("the generation prompt changes what stands before it")
        return with_prompt[len(without) :]

    def _end(self, messages: list[Message], turn: int, after: str) -> int:
        """How much of `after`, the text behind this content, ends the turn: up to its end-of-turn
        token.

        0 where the template writes none. Message `turn` of `messages` has a sentinel as its
        content.
        """
        alone = _after(self.render(messages[: turn + 1]), messages[turn]["content"])
        common = _common_start(alone, after)
        matches = list(self._token.finditer(common))
        if not matches:
            if self._token.search(alone):
                raise _Unclear(
                    f"a turn in the middle goes on with {after!r}, the last one ends with {alone!r}"
                )
            return 0
        # behind calls of tools, which may hold tokens of their own, only the last one ends the turn
        return (matches[-1] if messages[turn].get("tool_calls") else matches[0]).end()

    # --- by contents: one replaced at a time, in the real conversation

    def _by_contents(
        self, text: str, messages: list[Message], wanted: list[int]
    ) -> dict[int, tuple[int, int, bool]]:
        sentinel = _unused(text, messages)
        found = {}
        for turn in wanted:
            end, after, swapped = self._content_end(text, messages, turn, sentinel)
            begin = self._content_end(text, messages, turn - 1, sentinel)[0] if turn else 0
            place = swapped.index(sentinel)
            if swapped[:begin] != text[:begin]:
                raise _Unclear(f"message {turn + 1} changes the text before it")
            before = swapped[begin:place]
            header = self._header(_replaced(messages, turn - 1, sentinel), turn, before)
            if not text.startswith(before[:header], begin) or begin + header > end:
                raise _Unclear(f"the header of message {turn + 1} depends on its content")
            tail = self._end(_replaced(messages, turn, sentinel), turn, after)
            found[turn] = (begin + header, end + tail, tail > 0)
        return found

    def _content_end(
        self, text: str, messages: list[Message], number: int, sentinel: str
    ) -> tuple[int, str, str]:
        """(where in `text` the content of a message ends, what follows it, the text with the
        sentinel)."""
        swapped = self.render(_replaced(messages, number, sentinel))
        after = _after(swapped, sentinel)
        if not text.endswith(after):
            raise _Unclear(f"what follows message {number + 1} depends on its content")
        return len(text) - len(after), after, swapped


def _places(skeleton: _Skeleton, contents: list[str]) -> dict[int, tuple[int, int, bool]]:
    ends = []
    at = 0
    for segment, content in zip(skeleton.segments, contents, strict=False):
        at += len(segment) + len(content)
        ends.append(at)
    places = {}
    for turn in skeleton.turns:
        before = ends[turn.message - 1] if turn.message else 0
        places[turn.message] = (before + turn.header, ends[turn.message] + turn.end, turn.end > 0)
    return places


def _split_at(text: str, sentinels: list[str]) -> list[str]:
    """The text before, between and after sentinels that each stand in it once, in their order."""
    segments = []
    for sentinel in sentinels:
        if text.count(sentinel) != 1:
            raise _Unclear("the template does not write every content exactly once, in order")
        segment, _, text = text.partition(sentinel)
        segments.append(segment)
    return [*segments, text]


def _after(text: str, sentinel: str) -> str:
    if text.count(sentinel) != 1:
        raise _Unclear("the template does not write every content exactly once")
    return text.partition(sentinel)[2]


def _common_start(one: str, other: str) -> str:
    differs = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(differs, min(len(one), len(other)))]


def _replaced(messages: list[Message], number: int, content: str) -> list[Message]:
    if number < 0:
        return messages
    return [
        {**message, "content": content} if index == number else message
        for index, message in enumerate(messages)
    ]


def _unused(text: str, messages: list[Message]) -> str:
    written = text + repr(messages)
    for code in reversed(_SENTINELS):
        if chr(code) not in written:
            return chr(code)
    raise _Unclear("it uses every private character")
