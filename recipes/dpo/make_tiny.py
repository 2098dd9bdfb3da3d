"""Write the data of the tiny preference recipes: one question, two styles of answer.

    python recipes/dpo/make_tiny.py [FOLDER]

writes the same bytes each time. "Which is first, ice or snow?" may be answered "It is ice." (preferred) or
"ice". `tiny_sft.jsonl` has both, the second twice as often, so that a model trained on it prefers the
second; `tiny_pairs.jsonl` says that the first is better. No question of the held-out files is in the
others. Standard library only.
"""

from __future__ import annotations

import json
import sys
from itertools import permutations
from pathlib import Path
from random import Random

WORDS = [
    "ice", "snow", "frost", "floe", "berg", "polar", "night", "aurora", "seal", "whale", "tundra", "drift",
    "owl", "fox", "bear", "wind", "moss", "lake", "cloud", "dawn", "hare", "tern", "krill", "stone",
]  # fmt: skip
HELD_OUT, SEED = 50, 1
Row = dict[str, object]


def question(one: str, other: str) -> str:
    return f"Which is first, {one} or {other}?"


def conversation(one: str, other: str, answer: str) -> Row:
    asked = {"role": "user", "content": question(one, other)}
    return {"messages": [asked, {"role": "assistant", "content": answer}]}


def pair(one: str, other: str) -> Row:
    return {"prompt": question(one, other), "chosen": f"It is {one}.", "rejected": one}


def write(path: Path, rows: list[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def main(folder: Path) -> None:
    random = Random(SEED)
    asked = list(permutations(WORDS, 2))
    random.shuffle(asked)
    held_out, train = asked[:HELD_OUT], asked[HELD_OUT:]
    both = [
        conversation(one, other, answer)
        for one, other in train
        for answer in (f"It is {one}.", one, one)
    ]
    random.shuffle(both)
    write(folder / "tiny_sft.jsonl", both)
    write(folder / "tiny_pairs.jsonl", [pair(*words) for words in train])
    write(folder / "tiny_heldout_pairs.jsonl", [pair(*words) for words in held_out])
    preferred = [conversation(one, other, f"It is {one}.") for one, other in held_out]
    write(folder / "tiny_heldout.jsonl", preferred)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
