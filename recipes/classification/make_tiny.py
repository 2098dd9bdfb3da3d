"""Write the texts of the tiny classifier: seven words from three places, labelled by the place with the most.

    python recipes/classification/make_tiny.py [FOLDER]

writes the same bytes each time; no held-out text is in the other file. Standard library only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

PLACES = {
    "sea": ["floe", "berg", "seal", "whale", "krill", "tern"],
    "land": ["tundra", "moss", "fox", "bear", "hare", "stone"],
    "sky": ["aurora", "cloud", "dawn", "wind", "snow", "night"],
}
TRAINED, HELD_OUT, SEED = 1500, 200, 1


def row(random: Random) -> dict[str, str]:
    """Four or five words of one place, the others of the other two."""
    label, *others = random.sample(list(PLACES), 3)
    most = random.randint(4, 5)
    rest = [word for other in others for word in PLACES[other]]
    words = random.choices(PLACES[label], k=most) + random.choices(rest, k=7 - most)
    random.shuffle(words)
    return {"text": " ".join(words), "label": label}


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for one in rows:
            file.write(json.dumps(one) + "\n")


def main(folder: Path) -> None:
    random, found = Random(SEED), {}
    while len(found) < TRAINED + HELD_OUT:
        made = row(random)
        found[made["text"]] = made
    rows = list(found.values())
    write(folder / "tiny_heldout.jsonl", rows[:HELD_OUT])
    write(folder / "tiny.jsonl", rows[HELD_OUT:])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
