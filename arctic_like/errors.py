"""Every error that a user can cause or meet, in one tree.

    ArcticError                 exit code 1: the run failed
    ├── RecipeError             exit code 2: the recipe or the command is wrong (one or many problems)
    └── RunError                exit code 1
        ├── NonFiniteError      a loss or gradient became NaN or infinite
        ├── OutOfMemoryError    the device has no memory left
        ├── CheckpointError     a checkpoint cannot be read, written or used
        └── RelayedError        another rank failed; that rank tells the user

An error of this tree is shown as its sentences, without a traceback. Any other exception is a
defect, ours or of the user's own code, and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

DONE, FAILED, WRONG, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


class ArcticError(Exception):
    """Base of all expected errors; `str(error)` is what the user reads."""

    exit_code = FAILED


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it stands, what is wrong, and the way out.

    `message` holds value and rule ("is 'abc', not a whole number"); `hint` the way out.
    """

    message: str
    place: str = ""
    """Dotted path in the recipe (`data.sources.0.split`), or empty."""
    hint: str = ""
    file: str = ""
    line: int | None = None

    def __str__(self) -> str:
        where = self.file + (f":{self.line}" if self.line is not None else "")
        head = ": ".join(part for part in (where, self.place) if part)
        text = f"{head}: {self.message}" if head else self.message
        return f"{text}\n    {self.hint}" if self.hint else text


class RecipeError(ArcticError):
    """The recipe or the command is wrong. Holds all problems that were found, not the first."""

    exit_code = WRONG

    def __init__(self, problems: Problem | str | Iterable[Problem]) -> None:
        if isinstance(problems, str):
            problems = Problem(problems)
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RunError(ArcticError):
    """The run could not go on for a reason that the user can act on."""


class NonFiniteError(RunError):
    """A loss or a gradient norm became NaN or infinite; `step` is the first one where it did."""

    def __init__(self, message: str, *, step: int = 0) -> None:
        self.step = step
        super().__init__(message)


class OutOfMemoryError(RunError):
    """The device had no memory for what was asked. The message says where, and what the recipe takes."""


class CheckpointError(RunError):
    """A checkpoint cannot be read, written or used."""


class RelayedError(RunError):
    """Another rank failed and has told the user; this rank only ends, with the same exit code."""

    def __init__(self, message: str, *, exit_code: int = FAILED) -> None:
        self.exit_code = exit_code
        super().__init__(message)
