"""Where a preference's prompt ends and its two answers begin, if the row does not say."""

from __future__ import annotations

import re

from arctic_like.data.columns import RowError
from arctic_like.data.messages import Message

_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


def split_texts(chosen: str, rejected: str) -> tuple[list[Message], list[Message], list[Message]]:
    """(prompt, chosen, rejected) of two texts that begin with the same prompt.

    Transcripts (`\\n\\nHuman: …\\n\\nAssistant: …`) are taken apart into messages. Other texts are
    cut at the last end of a line in what they have in common, else at the last end of a sentence,
    else at the last space: not inside a word that both answers begin with. Raises RowError where
    they have nothing in common.
    """
    speeches = [_transcript(text) for text in (chosen, rejected)]
    if speeches[0] and speeches[1]:
        return split_messages(speeches[0], speeches[1])
    at = _border(chosen, rejected)
    if at is None:
        raise RowError(
            "has texts in 'chosen' and 'rejected' that begin differently, and no 'prompt'",
            hint="add the column `prompt`, or map it with `role_mapping: {prompt: …}`",
        )
    return (
        [{"role": "user", "content": chosen[:at].strip()}],
        [{"role": "assistant", "content": chosen[at:].lstrip()}],
        [{"role": "assistant", "content": rejected[at:].lstrip()}],
    )


def _border(chosen: str, rejected: str) -> int | None:
    """Where to cut two texts: at a white space of both, with text before and after it."""
    end = _common(chosen, rejected)
    first = len(chosen) - len(chosen.lstrip())
    last = min(end, len(chosen.rstrip()) - 1, len(rejected.rstrip()) - 1)
    found: dict[int, int] = {}
    for at in range(last, first, -1):
        here = chosen[at] + rejected[at]
        if not (here[0].isspace() and here[1].isspace()):
            continue
        if "\n" in here:
            return at
        found.setdefault(1 if chosen[at - 1] in ".!?…。！？" else 2, at)
    return found.get(1, found.get(2))


def _common(first: str, second: str) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
    return low


def _transcript(text: str) -> list[Message]:
    """The messages of a transcript; none where the text is not one."""
    marks = list(_SPEAKER.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        return []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[mark[1]], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]


def split_messages(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """(prompt, chosen, rejected) of two conversations that begin with the same prompt: their
    longest common prefix, but for the last message of either.

    Answers begin with the assistant: where they differ in a tool's result, they begin with the
    call before it. Raises RowError where they differ before an answer.
    """
    limit = min(len(chosen), len(rejected)) - 1
    end = 0
    while end < limit and chosen[end] == rejected[end]:
        end += 1
    differs = end
    while end > 0 and chosen[end]["role"] in ("tool", "function", "ipython"):
        end -= 1
    for name, answer in (("chosen", chosen[end:]), ("rejected", rejected[end:])):
        if answer and answer[0]["role"] != "assistant":
            raise RowError(
                f"has conversations in 'chosen' and 'rejected' that differ at message "
                f"{differs + 1}, which is the {answer[0]['role']}'s in {name!r}; expected are two "
                "answers of the assistant to the same messages"
            )
    return chosen[:end], chosen[end:], rejected[end:]
