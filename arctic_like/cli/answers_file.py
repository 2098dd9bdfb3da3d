"""Answers on the disk: a journal while they are made, the whole file at the end.

answers.jsonl.partial     what the answers belong to, then {"row": n, "answer": …}, in any order
answers.jsonl             the input's rows in their order with their answers; it appears at once, whole
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from arctic_like.cli.prompt_rows import PromptRow
from arctic_like.errors import Problem, RecipeError
from arctic_like.rundir import write_atomically


class AnswersFile:
    """The answers to all rows of one input, those of an interrupted attempt included.

    about: what the answers depend on; a journal of anything else is refused.
    """

    def __init__(self, path: Path, *, about: Mapping[str, Any]) -> None:
        self.path = path
        self.journal = path.with_name(f"{path.name}.partial")
        self.about = json.loads(json.dumps(about))
        self.answers: dict[int, str] = {}
        """Row's number → answer."""
        self._file: IO[bytes] | None = None

    def open(self) -> None:
        """Take up the journal, or begin one. Raises RecipeError where it belongs to something else."""
        end = self._take_up() if self.journal.exists() else 0
        self._file = self.journal.open("r+b" if end else "wb")
        self._file.truncate(end)  # a kill may have cut a line
        self._file.seek(end)
        if not end:
            self._write([{"about": self.about}])

    def add(self, answers: Mapping[int, str]) -> None:
        """Note the answers of a batch; they are on the disk when this returns."""
        self._write([{"row": row, "answer": answer} for row, answer in answers.items()])
        self.answers.update(answers)

    def close(self) -> None:
        """Close the journal; it stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self, rows: Sequence[PromptRow], *, key: str) -> None:
        """Write the whole file and remove the journal."""
        self.close()
        lines = [
            json.dumps({**row.content, key: self.answers[number]}, ensure_ascii=False)
            for number, row in enumerate(rows)
        ]
        write_atomically(self.path, "\n".join(lines) + "\n")
        self.journal.unlink(missing_ok=True)

    def _write(self, entries: Sequence[Mapping[str, Any]]) -> None:
        assert self._file is not None
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        self._file.write(text.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _take_up(self) -> int:
        """Read the whole lines of the journal; returns where they end."""
        data = self.journal.read_bytes()
        end = data.rfind(b"\n") + 1
        try:
            first, *rest = [json.loads(line) for line in data[:end].split(b"\n") if line] or [None]
            if first is None:
                return 0
            about = first["about"]
            answers = {int(entry["row"]): str(entry["answer"]) for entry in rest}
        except (ValueError, KeyError, TypeError) as error:
            raise self._foreign(f"cannot be read ({error})") from error
        names = sorted(self.about.keys() | about.keys())
        other = [name for name in names if about.get(name) != self.about.get(name)]
        if other:
            raise self._foreign(f"holds answers with another {', '.join(other)}")
        self.answers = answers
        return end

    def _foreign(self, what: str) -> RecipeError:
        hint = "repeat the command that wrote it, remove it, or name another --output"
        return RecipeError(Problem(what, file=str(self.journal), hint=hint))
