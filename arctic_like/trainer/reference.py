"""Log-probabilities of answers under a reference, computed once, kept by what the samples hold.

    <cache>/reference/<key>/keys.npy    (samples,) uint64: `content_key` of each sample
                            starts.npy  (samples + 1,) int64, into values
                            values.npy  (answers,) float64: log π_ref(y|x), chosen and rejected in turn

An entry holds `CHUNK` samples; its key is of their hashes and of the reference (`fingerprint`). So a
preparation that was killed goes on where it was, other runs find what this one computed, and a batch finds
its answers by what is in it, whatever the order, the set or the number of ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.data import cache
from arctic_like.errors import Problem, RecipeError, RunError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from arctic_like.data.balance import Division
    from arctic_like.data.base import SampleSet
    from arctic_like.engine.host import HostGroup

CHUNK = 4096
"""Samples of an entry: a kill loses no more."""
FORMAT = 1
_CONTENT = ("input_ids", "labels", "segment_ids")
Score = Callable[[dict[str, "Tensor"]], "Tensor"]
"""A collated batch on the host → (documents,) log-probabilities under the reference."""


def content_key(sample: Mapping[str, Any]) -> int:
    """64 bits of what a sample holds: its tokens, what is trained, where documents end; arrays of one
    length."""
    import numpy as np
    import xxhash

    state = xxhash.xxh3_64()
    for name in _CONTENT:
        state.update(np.ascontiguousarray(sample[name], dtype=np.int64).tobytes())
    return int(state.intdigest())


def batch_keys(batch: Mapping[str, Tensor]) -> list[int]:
    """The key of each row of a batch on the host, without its padding."""
    arrays = {name: batch[name].numpy() for name in _CONTENT}
    lengths = (arrays["segment_ids"] >= 0).sum(axis=1)
    return [
        content_key({name: values[row, :length] for name, values in arrays.items()})
        for row, length in enumerate(lengths)
    ]


class ReferenceTable:
    """What the reference gives every sample, by `content_key`; lookups in constant memory a batch."""

    def __init__(
        self, keys: NDArray[np.uint64], starts: NDArray[np.int64], values: NDArray[np.float64]
    ) -> None:
        import numpy as np

        order = np.argsort(keys, kind="stable")
        self._keys, self._first, self._last = keys[order], starts[:-1][order], starts[1:][order]
        self._values = values

    def of(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(documents,) float64 of a batch on the host. Raises RunError for a sample that is not in it."""
        import numpy as np
        import torch

        found = []
        for key in batch_keys(batch):
            place = int(np.searchsorted(self._keys, np.uint64(key)))
            if place == len(self._keys) or int(self._keys[place]) != key:
                raise RunError(
                    "precompute_reference: a batch holds a sample that was not there when the reference "
                    "was computed\n    set it to false where samples are made while training"
                )
            found.append(self._values[self._first[place] : self._last[place]])
        return torch.from_numpy(np.concatenate(found))


def fingerprint(module: nn.Module, host: HostGroup) -> str:
    """A hash of names, shapes, dtypes and values of all weights, and of the attention. Collective."""
    import torch
    import xxhash

    from arctic_like.engine.weights import iterate_weights

    config = getattr(module, "config", None)
    state = xxhash.xxh3_128()
    state.update(f"{FORMAT} {getattr(config, '_attn_implementation', '')}".encode())
    for name, tensor in iterate_weights(module):
        if tensor is None:
            continue
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.contiguous().reshape(-1)
        state.update(flat.view(torch.uint8).numpy().data)
    return host.from_main(str(state.hexdigest()))


def prepare_table(
    sets: Sequence[SampleSet], collate: Callable[[list[Any]], dict[str, Tensor]], score: Score, *,
    reference: str, root: Path, division: Division, host: HostGroup, chunk: int = CHUNK,
) -> ReferenceTable:  # fmt: skip
    """The table of all samples of the sets: read where it is kept, else computed, by all ranks in step.

    reference: of `fingerprint`, with what else changes the numbers. Collective; rank 0 alone reads and
    writes.
    """
    import numpy as np
    from loguru import logger

    parts: list[tuple[Any, Any, Any]] = []
    total, done, made = sum(len(samples) for samples in sets), 0, 0
    for samples in sets:
        for start in range(0, len(samples), chunk):
            places = range(start, min(start + chunk, len(samples)))
            keys = _keys(samples, places, host)
            name = cache.key_of({"reference": reference, "samples": [str(key) for key in keys]})
            entry = root / "reference" / name
            if not host.from_main(cache.is_complete(entry)):
                values, lengths = _computed(samples, places, collate, score, division, host)
                _together(host, lambda: _write(entry, keys, lengths, values))  # noqa: B023
                made += len(places)
                done += len(places)
                if host.world.is_main:
                    logger.info(f"reference: {done:,} of {total:,} samples computed")
            else:
                done += len(places)
            parts.append(_together(host, lambda: _read(entry)))  # noqa: B023
    if host.world.is_main:
        logger.info(f"reference: {made:,} samples computed, {total - made:,} found")
    sizes = [np.diff(starts) for _, starts, _ in parts]
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64)
    return ReferenceTable(
        np.concatenate([keys for keys, _, _ in parts]), starts,
        np.concatenate([values for _, _, values in parts]),
    )  # fmt: skip


@contextlib.contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """No dropout inside; every part is afterwards in the mode that it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def raise_for_vocabularies(own: int | None, theirs: int | None) -> None:
    """Raise RecipeError where two known numbers of tokens differ."""
    if own and theirs and own != theirs:
        raise RecipeError(
            Problem(
                f"has {theirs:,} tokens, the policy {own:,}: their log-probabilities cannot be compared",
                "reference.model",
                "take the model that the policy starts from, or one with its vocabulary",
            )
        )


def vocabulary(module: Any) -> int | None:
    """How many tokens a model knows; None where its config does not say."""
    config = getattr(module, "config", None)
    found = getattr(config, "vocab_size", None)
    return None if found is None else int(found)


def _keys(samples: SampleSet, places: range, host: HostGroup) -> list[int]:
    """The keys of some samples, each computed by one rank."""
    size, rank = host.world.size, host.world.rank
    mine = [content_key(samples[place]) for place in places[rank::size]]
    everyone = host.gather(mine)
    return [everyone[number % size][number // size] for number in range(len(places))]


def _computed(
    samples: SampleSet, places: range, collate: Callable[[list[Any]], dict[str, Tensor]],
    score: Score, division: Division, host: HostGroup,
) -> tuple[Any, list[int]]:  # fmt: skip
    """(values of all answers in the order of the samples, answers of each), on every rank."""
    import numpy as np

    from arctic_like.data.loader import divided

    share, stand_in = divided(
        np.arange(places.start, places.stop), samples, collate, division,
        rank=host.world.data_rank, size=host.world.data_size,
    )  # fmt: skip
    mine: dict[int, Any] = {}
    for rows in share:
        batch = collate([samples[place] for place in rows or [stand_in]])
        values = score(batch).cpu().numpy()
        counts = batch["segment_ids"].numpy().max(axis=1) + 1
        pieces = np.split(values, np.cumsum(counts)[:-1])
        mine |= dict(zip(rows, pieces, strict=False))
    found: dict[int, Any] = {}
    for part in host.gather(mine):
        found |= part
    ordered = [found[place] for place in places]
    return np.concatenate(ordered), [len(one) for one in ordered]


def _write(entry: Path, keys: list[int], lengths: list[int], values: Any) -> None:
    import numpy as np

    def fill(folder: Path) -> dict[str, Any]:
        np.save(folder / "keys.npy", np.array(keys, dtype=np.uint64))
        np.save(folder / "starts.npy", np.cumsum([0, *lengths], dtype=np.int64))
        np.save(folder / "values.npy", np.asarray(values, dtype=np.float64))
        return {"samples": len(keys), "answers": len(values)}

    cache.obtain(entry.parent, entry.name, fill, what="the reference")


def _read(entry: Path) -> tuple[Any, Any, Any]:
    import numpy as np

    return tuple(np.load(entry / f"{name}.npy") for name in ("keys", "starts", "values"))


def _together(host: HostGroup, work: Callable[[], Any]) -> Any:
    """What rank 0's work gives, on every rank; its error too."""
    found, error = None, None
    if host.world.is_main:
        try:
            found = work()
        except BaseException as problem:
            error = problem
    host.raise_together(error)
    return host.from_main(found)
