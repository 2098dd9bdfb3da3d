"""Write the conversations of the quickstart: short tasks with exactly one right answer each.

    python recipes/data/make_quickstart.py [FOLDER]

writes `quickstart_train.jsonl` and `quickstart_heldout.jsonl`, the same bytes each time. A row is
`{"messages": [...], "kind": "repeat"}`; it has one to three questions, and `kind` is that of the
last one. No question of the held-out file occurs in the training file. Standard library only.

Words have five letters: what a model looks up then stands at a fixed distance, which a small one
learns in a minute. With words of four to six letters the same model needs several times as long.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

SEED = 3
"""One with which no constant answer to the held-out questions of a kind is right more than 1 in 10."""
HELD_OUT_ROWS, TRAIN_ROWS = 560, 16_000
TURNS = (1, 1, 1, 1, 2, 3)
"""A row has so many questions, each entry as often as the others."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"
Question = tuple[str, str]


def word(random: Random, size: int = 5) -> str:
    """Letters that mostly take turns between consonants and vowels, so that a word can be said."""
    vowel = random.random() < 0.4
    letters = ""
    while len(letters) < size:
        letters += random.choice(VOWELS if vowel else CONSONANTS)
        vowel = not vowel if random.random() < 0.85 else vowel
    return letters


def three_words(random: Random) -> list[str]:
    return [word(random) for _ in range(3)]


def repeat(random: Random) -> Question:
    text = word(random)
    return f"Repeat {text}", text


def shift(random: Random) -> Question:
    text = word(random)
    return f"Shift {text}", "".join(LETTERS[(LETTERS.index(c) + 1) % 26] for c in text)


def count(random: Random) -> Question:
    text = word(random, random.randint(2, 16))
    return f"Count {text}", str(len(text))


def first(random: Random) -> Question:
    words = three_words(random)
    return f"First {' '.join(words)}", words[0]


def second(random: Random) -> Question:
    words = three_words(random)
    return f"Second {' '.join(words)}", words[1]


def last(random: Random) -> Question:
    words = three_words(random)
    return f"Last {' '.join(words)}", words[2]


KINDS: dict[str, Callable[[Random], Question]] = {
    f.__name__: f for f in (repeat, shift, count, first, second, last)
}


def rows(random: Random, number: int, *, asked: set[str]) -> Iterator[dict[str, object]]:
    """`number` conversations, the kinds of their last questions in turn.

    No question that is in `asked` occurs, and none twice; all are added to it.
    """
    for index in range(number):
        kinds = random.choices(list(KINDS), k=random.choice(TURNS) - 1)
        kinds.append(list(KINDS)[index % len(KINDS)])
        messages: list[dict[str, str]] = []
        for kind in kinds:
            question, answer = ask(kind, random, asked=asked)
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        yield {"messages": messages, "kind": kinds[-1]}


def ask(kind: str, random: Random, *, asked: set[str]) -> Question:
    """A question that was not asked before, with its answer."""
    while True:
        question, answer = KINDS[kind](random)
        if question not in asked:
            asked.add(question)
            return question, answer


def write(path: Path, content: Iterator[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in content:
            file.write(json.dumps(row) + "\n")


def main(folder: Path) -> None:
    random = Random(SEED)
    asked: set[str] = set()
    write(folder / "quickstart_heldout.jsonl", rows(random, HELD_OUT_ROWS, asked=asked))
    write(folder / "quickstart_train.jsonl", rows(random, TRAIN_ROWS, asked=asked))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
