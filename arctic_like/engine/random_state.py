"""The random generators of a process: seeded, taken down, put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any


def seed_everything(seed: int, *, rank: int) -> None:
    """Seed python, numpy and torch (all devices) of this process; ranks differ."""
    import numpy
    import torch

    own = (seed + rank * 1_000_003) % 2**32
    random.seed(own)
    numpy.random.seed(own)
    torch.manual_seed(own)


def random_state() -> dict[str, Any]:
    """Every generator's state as plain types and tensors."""
    import numpy
    import torch

    words: Any = numpy.random.get_state(legacy=True)
    kind, keys, *rest = words
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (
            kind,
            torch.from_numpy(numpy.asarray(keys).astype("int64")),
            *[float(r) for r in rest],
        ),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` took."""
    import numpy
    import torch

    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state(
        (kind, keys.numpy().astype("uint32"), int(position), int(has_gauss), cached)
    )
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Whatever happens inside leaves all generators as they were."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
