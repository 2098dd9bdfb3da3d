"""Write the texts of the tiny distillation: sentences of a small grammar, some words likelier than others.

    python recipes/distill/make_tiny.py [FOLDER]

writes the same bytes each time; no held-out text is in the other file. Standard library only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

ANIMALS = ["seal", "whale", "fox", "bear", "owl", "hare", "tern"]
VERBS = {
    "sees": ["the moon", "a floe", "its young", "the aurora"],
    "follows": ["the wind", "a trail", "the herd", "its mother"],
    "hears": ["the ice", "a storm", "the waves", "far thunder"],
    "leaves": ["the shore", "its den", "the island", "no trace"],
}
TIMES = ["at dawn", "at night", "in spring", "all winter", "once more"]
TRAINED, HELD_OUT, SEED = 600, 80, 1


def sentence(random: Random) -> str:
    animal = random.choices(ANIMALS, weights=range(len(ANIMALS), 0, -1))[0]
    verb = random.choices(list(VERBS), weights=[5, 3, 2, 1])[0]
    what = random.choices(VERBS[verb], weights=[6, 3, 2, 1])[0]
    return f"the {animal} {verb} {what} {random.choice(TIMES)}."


def write(path: Path, texts: list[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")


def main(folder: Path) -> None:
    random, found = Random(SEED), dict[str, None]()
    while len(found) < TRAINED + HELD_OUT:
        found[" ".join(sentence(random) for _ in range(3))] = None
    texts = list(found)
    write(folder / "tiny_heldout.jsonl", texts[:HELD_OUT])
    write(folder / "tiny.jsonl", texts[HELD_OUT:])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
