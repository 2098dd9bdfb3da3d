"""Random draws that depend on a seed and a name, and leave the global generators alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Run the body; afterwards the generators of Python, numpy and torch are as they were."""
    import numpy as np
    import torch

    cuda = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def seed_by_name(seed: int, name: str) -> None:
    """Seed the CPU generators of Python, numpy and torch from (seed, name)."""
    import numpy as np
    import torch

    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little")
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.default_generator.manual_seed(key % 2**63)
