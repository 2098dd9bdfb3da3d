"""Files of prompts: what `arctic-train generate` reads, row by row."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arctic_like.errors import Problem, RecipeError

SHOWN = 10
"""How many bad rows an error shows."""


@dataclass(frozen=True)
class PromptRow:
    """One row of the input."""

    line: int
    """Counted from 1 in the file."""
    content: dict[str, Any]
    """Its keys, in their order; a plain line of text is `{"prompt": …}`."""

    @property
    def messages(self) -> list[dict[str, Any]] | None:
        """The conversation to answer; None where the row has a prompt as text."""
        found = self.content.get("messages", self.content.get("prompt"))
        return list(found) if isinstance(found, list) else None


def read_rows(path: Path, *, answer_key: str) -> list[PromptRow]:
    """All rows of a `.jsonl` file, or the lines of any other, without empty lines.

    Raises RecipeError for a file that cannot be read and, with file and line, for rows without a prompt.
    """
    try:
        # not splitlines: a line of JSON may hold U+2028
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(Problem(f"cannot be read: {error}", place="--input")) from error
    is_json = path.suffix in (".jsonl", ".json", ".ndjson")
    rows: list[PromptRow] = []
    problems: list[Problem] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            content = _parsed(line, answer_key) if is_json else {"prompt": line.rstrip("\r")}
        except ValueError as error:
            problems.append(Problem(str(error), file=str(path), line=number))
        else:
            rows.append(PromptRow(number, content))
    refuse(problems)
    if not rows:
        raise RecipeError(
            Problem("has no prompt", file=str(path), hint='write one row a line: {"prompt": "…"}')
        )
    return rows


def refuse(problems: list[Problem]) -> None:
    """Raise RecipeError with the first of `problems`, if there are any."""
    if len(problems) > SHOWN:
        raise RecipeError(
            [*problems[:SHOWN], Problem(f"and {len(problems) - SHOWN} more rows are wrong")]
        )
    if problems:
        raise RecipeError(problems)


def _parsed(line: str, answer_key: str) -> dict[str, Any]:
    """A row of JSON. Raises ValueError with what is wrong with it."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"is {type(row).__name__}, not an object with a prompt")
    if answer_key in row:
        raise ValueError(f"has the key {answer_key!r} already\n    give --answer-key another name")
    if ("prompt" in row) == ("messages" in row):
        which = "both" if "prompt" in row else "neither"
        raise ValueError(
            f'has {which} of the keys "prompt" and "messages"; it has {", ".join(row) or "none"}'
        )
    asked = row.get("messages", row.get("prompt"))
    if isinstance(asked, str) and "prompt" in row:
        if not asked:
            raise ValueError("has an empty prompt")
        return row
    _check_messages(asked)
    return row


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError("has messages that are no list of turns")
    for number, turn in enumerate(messages):
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise ValueError(f'has a turn (number {number}) without "role" and "content"')
    if messages[-1]["role"] == "assistant":
        raise ValueError("ends with the assistant's turn: there is nothing left to answer")
