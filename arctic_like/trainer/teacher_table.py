"""A teacher's highest probabilities at every trained place, computed once, kept by what the samples hold.

    <cache>/teacher/<key>/keys.npy      (samples,) uint64: `row_key` of each sample
                          starts.npy    (samples + 1,) int64, into the others
                          tokens.npy    (places, k) int32
                          logprobs.npy  (places, k + 1) float32, the last of all other tokens together;
                                        (places, k) where there are no others

An entry holds `CHUNK` samples; its key is of their hashes, of the teacher and of what else changes the
numbers. A preparation that was killed goes on where it was, and other runs find what this one computed.
The files are mapped: what is read of them in a step is what a batch needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.data import cache
from arctic_like.errors import RunError
from arctic_like.trainer.losses import IGNORE

if TYPE_CHECKING:
    from torch import Tensor, nn

    from arctic_like.data.base import PreparedData, SampleSet
    from arctic_like.engine.host import HostGroup

CHUNK = 256
"""Samples of an entry; with 64 tokens of 1,000 places each, 130 MB."""
FORMAT = 1
_FILES = ("keys", "starts", "tokens", "logprobs")
Logits = Callable[[dict[str, Any]], "Tensor"]
"""A collated batch on the host → the teacher's (rows, length, vocabulary)."""


def row_key(input_ids: Any, labels: Any, position_ids: Any) -> int:
    """64 bits of a row up to its last trained token, so that padding behind it does not count. Arrays of
    one length."""
    import numpy as np
    import xxhash

    trained = np.flatnonzero(np.asarray(labels) != IGNORE)
    end = int(trained[-1]) + 1 if len(trained) else 0
    state = xxhash.xxh3_64()
    for values in (input_ids, labels, position_ids):
        state.update(np.ascontiguousarray(np.asarray(values)[:end], dtype=np.int64).tobytes())
    return int(state.intdigest())


class TeacherTable:
    """What is kept of the teacher, by `row_key`. entries: folders in the cache."""

    def __init__(self, entries: Sequence[Path]) -> None:
        import numpy as np

        self._parts = [
            tuple(np.load(entry / f"{name}.npy", mmap_mode="r") for name in _FILES)
            for entry in entries
        ]
        self._where = {
            int(key): (number, place)
            for number, (keys, *_) in enumerate(self._parts)
            for place, key in enumerate(keys)
        }

    def of(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(tokens, log-probabilities) of the trained places of a batch on the host, row by row. Raises
        RunError for a sample that is not in it."""
        import numpy as np
        import torch

        tokens, logprobs = [], []
        for key in batch_keys(batch):
            if key not in self._where:
                raise RunError(
                    "teacher_cache: a batch holds a sample that was not there when the teacher was asked"
                    "\n    leave it out where samples are made while training"
                )
            number, place = self._where[key]
            _, starts, their_tokens, their_logprobs = self._parts[number]
            here = slice(int(starts[place]), int(starts[place + 1]))
            tokens.append(their_tokens[here])
            logprobs.append(their_logprobs[here])
        return torch.from_numpy(np.concatenate(tokens)), torch.from_numpy(np.concatenate(logprobs))


def batch_keys(batch: Mapping[str, Tensor]) -> list[int]:
    """The key of each row of a batch on the host."""
    arrays = [batch[name].numpy() for name in ("input_ids", "labels", "position_ids")]
    return [row_key(*(values[row] for values in arrays)) for row in range(len(arrays[0]))]


def tabulate(
    config: Any, data: PreparedData, logits: Logits, *, module: nn.Module, host: HostGroup
) -> TeacherTable:
    """The table of all samples of a run: read where it is kept, else computed, by all ranks in step.

    config: a `DistillConfig` with `teacher_cache`. Collective; the first rank of each machine writes.
    """
    import torch
    from loguru import logger

    from arctic_like.data.balance import division_of
    from arctic_like.engine.random_state import preserved
    from arctic_like.trainer.reference import fingerprint, in_evaluation

    kept = config.teacher_cache.top_k
    name = f"{FORMAT} {fingerprint(module, host)} {kept} {config.temperature}"
    root = cache.root(getattr(config.data, "cache_dir", None)) / "teacher"
    sets: list[SampleSet] = [*data.evaluation.values(), *data.test.values()]
    if data.train is not None and not config.test_only:
        sets.insert(0, data.train)
    division = division_of(config.data, config.rows)
    entries, made, total = [], 0, 0
    with preserved(), torch.no_grad(), in_evaluation(module):
        for samples in sets:
            for start in range(0, len(samples), CHUNK):
                places = range(start, min(start + CHUNK, len(samples)))
                keys = _keys(samples, places, host)
                key = cache.key_of({"teacher": name, "samples": [str(one) for one in keys]})
                entry = root / key
                total += len(places)
                # caches of several machines may differ
                if not all(host.gather(cache.is_complete(entry))):
                    found = _computed(
                        samples, places, data.collate, logits, division, host,
                        count=kept, temperature=config.temperature,
                    )  # fmt: skip
                    made += len(places)
                    _write(entry, keys, found, host)
                entries.append(entry)
    if host.world.is_main:
        logger.info(f"teacher: {made:,} samples computed, {total - made:,} found")
    return TeacherTable(entries)


def _keys(samples: SampleSet, places: range, host: HostGroup) -> list[int]:
    """The keys of some samples, each computed by one rank."""
    size, rank = host.world.size, host.world.rank
    mine = []
    for place in places[rank::size]:
        sample = samples[place]
        mine.append(row_key(sample["input_ids"], sample["labels"], sample["position_ids"]))
    everyone = host.gather(mine)
    return [everyone[number % size][number // size] for number in range(len(places))]


def _computed(
    samples: SampleSet, places: range, collate: Any, logits: Logits, division: Any,
    host: HostGroup, *, count: int, temperature: float,
) -> list[tuple[Any, Any]]:  # fmt: skip
    """(tokens, log-probabilities) of each sample in order, on every rank."""
    import numpy as np

    from arctic_like.data.loader import divided
    from arctic_like.methods.distillation import highest

    share, stand_in = divided(
        np.arange(places.start, places.stop), samples, collate, division,
        rank=host.world.rank, size=host.world.size,
    )  # fmt: skip
    mine: dict[int, tuple[Any, Any]] = {}
    for rows in share:
        batch = collate([samples[place] for place in rows or [stand_in]])
        trained = batch["labels"][:, 1:] != IGNORE
        of_teacher = logits(batch)[:, :-1]
        kept = highest(
            of_teacher[trained.to(of_teacher.device)], count=count, temperature=temperature
        )
        ends = np.cumsum(trained.sum(1).numpy())[:-1]
        parts = [
            np.split(one.cpu().numpy().astype(kind), ends)
            for one, kind in zip(kept, ("<i4", "<f4"), strict=True)
        ]
        mine |= dict(zip(rows, zip(*parts, strict=True), strict=False))
    found: dict[int, tuple[Any, Any]] = {}
    for part in host.gather(mine):
        found |= part
    return [found[place] for place in places]


def _write(entry: Path, keys: list[int], found: list[tuple[Any, Any]], host: HostGroup) -> None:
    """Keep a chunk: the first rank of each machine does; all go on when it is there."""
    import numpy as np

    def fill(folder: Path) -> dict[str, Any]:
        starts = np.cumsum([0, *(len(tokens) for tokens, _ in found)], dtype=np.int64)
        arrays = {
            "keys": np.array(keys, dtype=np.uint64),
            "starts": starts,
            "tokens": np.concatenate([tokens for tokens, _ in found]),
            "logprobs": np.concatenate([logprobs for _, logprobs in found]),
        }
        for name, values in arrays.items():
            np.save(folder / f"{name}.npy", values)
        return {"samples": len(keys), "places": int(starts[-1])}

    error: BaseException | None = None
    if host.world.local_rank == 0:
        try:
            cache.obtain(entry.parent, entry.name, fill, what="the teacher's answers")
        except BaseException as problem:
            error = problem
    host.raise_together(error)
    host.barrier()
