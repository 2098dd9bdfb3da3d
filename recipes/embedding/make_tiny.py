"""Write the pairs of the tiny embedding model: three words in capitals, and the same words in another order.

    python recipes/embedding/make_tiny.py [FOLDER]

writes the same bytes each time. No three words of the held-out file stand together in the other.
Standard library only.
"""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path
from random import Random

WORDS = [
    "ice", "snow", "frost", "floe", "berg", "polar", "night", "aurora", "seal", "whale", "tundra", "drift",
    "owl", "fox", "bear", "wind", "moss", "lake", "cloud", "dawn", "hare", "tern", "krill", "stone",
]  # fmt: skip
HELD_OUT, TRAINED, SEED = 100, 1200, 1


def write(path: Path, groups: list[tuple[str, ...]], random: Random) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for group in groups:
            query, positive = (" ".join(random.sample(group, len(group))) for _ in range(2))
            file.write(json.dumps({"query": query.upper(), "positive": positive}) + "\n")


def main(folder: Path) -> None:
    random = Random(SEED)
    groups = random.sample(list(combinations(WORDS, 3)), HELD_OUT + TRAINED)
    write(folder / "tiny_heldout.jsonl", groups[:HELD_OUT], random)
    write(folder / "tiny.jsonl", groups[HELD_OUT:], random)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
