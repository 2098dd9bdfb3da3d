"""Conversations → text, by the tokenizer's own chat template.

The text is what transformers' `apply_chat_template` writes: its compiled template is called as it
is (`trim_blocks`, `tojson`, `{% generation %}`, …), without the copies and checks that its public
function makes for every conversation. One thing differs: **time stands still.** A template that
writes today's date would make other tokens of the same recipe tomorrow, and of the two halves of a
preparation that was interrupted at midnight; it is given `TODAY` instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from arctic_like.data.shapes import Message, RowError
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

TODAY = datetime(2024, 7, 26)
"""What a template is told when it asks for the date: the day that Llama 3's own templates fall back
to."""

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_PLAIN = (str, int, float, bool, type(None))


class Renderer:
    """The chat template of a tokenizer. Picklable.

    Raises RecipeError where there is none, or a broken one."""

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
        self._variables: dict[str, Any] = {
            **tokenizer.special_tokens_map,
            "documents": None,
            "strftime_now": TODAY.strftime,
        }
        self._compiled: Any = None
        self._template()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}

    def __call__(
        self,
        messages: Sequence[Message],
        *,
        tools: list[Any] | None = None,
        generation: bool = False,
    ) -> str:
        """The conversation as text, `generation`: up to where the assistant begins to write.

        Raises RowError where the template refuses it.
        """
        template = self._template()
        try:
            text: str = template.render(self._values(messages, tools, generation))
        except Exception as error:
            raise _refused(error) from error
        return text

    def marks(
        self, messages: Sequence[Message], *, tools: list[Any] | None = None
    ) -> tuple[str, list[Span]]:
        """The text, and the stretches that the template's `{% generation %}` blocks wrote."""
        template = self._template()
        blocks: list[str] = []
        spans: list[Span] = []
        try:
            # the tracker asks how long the text is so far, so blocks must come one by one
            with template.environment.activate_tracker(blocks, spans):
                for block in template.generate(self._values(messages, tools, False)):
                    blocks.append(block)
        except Exception as error:
            raise _refused(error) from error
        return "".join(blocks), [(start, end) for start, end in spans]

    def _template(self) -> Any:
        if self._compiled is None:
            from jinja2 import TemplateSyntaxError
            from transformers.utils import chat_template_utils

            try:
                self._compiled = chat_template_utils._compile_jinja_template(self.source)
            except TemplateSyntaxError as error:
                raise RecipeError(
                    Problem(
                        f"is broken at its line {error.lineno}: {error.message}",
                        place="tokenizer.chat_template",
                        hint="mend the template",
                    )
                ) from None
        return self._compiled

    def _values(
        self, messages: Sequence[Message], tools: list[Any] | None, generation: bool
    ) -> dict[str, Any]:
        return {
            **self._variables,
            "messages": [_seen(message) for message in messages],
            "tools": _plain(tools),
            "add_generation_prompt": generation,
        }


def _refused(error: Exception) -> RowError:
    from jinja2 import TemplateError

    kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
    return RowError(f"is refused by the chat template: {kind}{error}")


def _seen(message: Message) -> Message:
    """A message as templates see it: plain values only, its reasoning under each of its names."""
    if len(message) == 2 and type(message.get("content")) is str:
        return message  # role and content, as most are
    plain: Message = _plain(message)
    for key in _REASONING:
        reasoning = plain.get(key)
        if reasoning is not None:
            return {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _plain(value: Any) -> Any:
    """Plain JSON values and their containers; anything else becomes the name of its type, as a
    template is code from elsewhere and must not get hold of objects."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"
