"""Random numbers of a sample: a function of seed, step and sample, and of nothing else.

What a generator draws depends on who draws what before; these numbers do not, so that a step is the
same for any number of ranks and micro-batches, and after a resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from arctic_like.data.order import key_of

if TYPE_CHECKING:
    from torch import Tensor


def uniform_noise(samples: Sequence[int], shape: Sequence[int], *, key: int) -> Tensor:
    """Uniform in the open interval (0, 1), (len(samples), *shape) float32 on the CPU.

    key: of seed, step and purpose (`order.key_of`). Philox (Salmon et al. 2011), one stream a sample.
    """
    import torch

    size = int(np.prod(shape, dtype=np.int64))
    rows = [
        np.random.Generator(np.random.Philox(key=key_of(key, sample))).random(size, np.float32)
        for sample in samples
    ]
    values = np.stack(rows) if rows else np.zeros((0, size), np.float32)
    tiny = np.finfo(np.float32).tiny
    return torch.from_numpy(np.clip(values, tiny, None)).view(len(samples), *shape)


def normal_noise(samples: Sequence[int], shape: Sequence[int], *, key: int) -> Tensor:
    """Standard normal, (len(samples), *shape) float32 on the CPU; `key` as in `uniform_noise`."""
    import torch

    size = int(np.prod(shape, dtype=np.int64))
    rows = [
        np.random.Generator(np.random.Philox(key=key_of(key, sample))).standard_normal(
            size, np.float32
        )
        for sample in samples
    ]
    values = np.stack(rows) if rows else np.zeros((0, size), np.float32)
    return torch.from_numpy(values).view(len(samples), *shape)
