"""Write the pairs of the tiny reward model: three tasks, each with the answer to one of the others.

    python recipes/reward/make_tiny.py [FOLDER]

writes the same bytes each time. "Say ice floe in capitals." is answered "ICE FLOE", and wrongly "ice floe" or
"ice floe ice floe"; which answer is better thus depends on the question alone. No two words of the held-out
file stand together in the other. Standard library only.
"""

from __future__ import annotations

import json
import sys
from itertools import combinations, permutations
from pathlib import Path
from random import Random

WORDS = [
    "ice", "snow", "frost", "floe", "berg", "polar", "night", "aurora", "seal", "whale", "tundra", "drift",
    "owl", "fox", "bear", "wind", "moss", "lake", "cloud", "dawn", "hare", "tern", "krill", "stone",
]  # fmt: skip
TASKS = {
    "Say {} in capitals.": str.upper,
    "Say {} in small letters.": str.lower,
    "Say {} twice.": lambda text: f"{text} {text}",
}
HELD_OUT, ROWS_EACH, SEED = 30, 4, 1
"""Couples of words that are held out; rows of a couple, of the six that there are."""
Row = dict[str, str]


def rows(couple: tuple[str, str], random: Random) -> list[Row]:
    """Some pairs about two words, in either order."""
    found = []
    for task, other in permutations(TASKS, 2):
        text = " ".join(random.sample(couple, 2))
        found.append({
            "prompt": task.format(text), "chosen": TASKS[task](text), "rejected": TASKS[other](text)
        })  # fmt: skip
    return random.sample(found, ROWS_EACH)


def write(path: Path, pairs: list[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in pairs:
            file.write(json.dumps(row) + "\n")


def main(folder: Path) -> None:
    random = Random(SEED)
    couples = list(combinations(WORDS, 2))
    random.shuffle(couples)
    held_out = [row for couple in couples[:HELD_OUT] for row in rows(couple, random)]
    train = [row for couple in couples[HELD_OUT:] for row in rows(couple, random)]
    random.shuffle(train)
    write(folder / "tiny_pairs.jsonl", train)
    write(folder / "tiny_heldout_pairs.jsonl", held_out)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
