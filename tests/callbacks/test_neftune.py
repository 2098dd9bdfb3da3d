"""NEFTune's noise against its formula, the generator against Python's whole numbers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arctic_like.callbacks.neftune import NEFTune, NEFTuneConfig, document_lengths, noise_of
from arctic_like.data.order import mix
from arctic_like.errors import RecipeError, RunError

WIDTH = 16


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(10, WIDTH, _weight=torch.zeros(10, WIDTH))

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.table


def trainer(module: torch.nn.Module, samples: list[int], step: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        module=module, updating="model", samples=samples, global_step=step,
        config=SimpleNamespace(seed=1),
    )  # fmt: skip


def noisy(positions: list[list[int]], samples: list[int], *, step: int = 0, alpha: float = 5.0,
          device_rows: bool = True) -> torch.Tensor:  # fmt: skip
    """The noise that the embeddings of these documents get."""
    module = Tiny()
    callback = NEFTune(NEFTuneConfig(alpha=alpha))
    it = trainer(module, samples, step)
    callback.on_setup_end(it)
    ids = torch.zeros(len(positions), len(positions[0]), dtype=torch.long)
    clean = torch.nn.functional.embedding(ids, module.table.weight)
    callback.on_micro_batch_start(it, {"position_ids": torch.tensor(positions)})
    found = module.table(ids if device_rows else ids.reshape(1, -1)).view(clean.shape) - clean
    callback.on_micro_batch_end(it, None, None)
    assert torch.equal(module.table(ids), clean), "only inside a micro-batch"
    return found.detach()


@given(st.integers(0, 2**64 - 1), st.integers(1, 5), st.integers(1, 7))
def test_the_generator_is_splitmix64(key: int, length: int, width: int) -> None:
    found = noise_of([key], length, width, device="cpu").flatten().tolist()
    # `mix` adds the golden ratio once; the i-th word here begins at key + i · golden ratio
    golden = 0x9E3779B97F4A7C15
    for i, value in enumerate(found):
        word = mix((key + (i - 1) * golden) % 2**64)
        assert value == (word >> 40) / 2**23 - 1


def test_the_bound_is_that_of_each_document() -> None:
    lengths = [3, 40, 7]
    row = [p for n in lengths for p in range(n)]
    noise = noisy([row] * 200, list(range(200)), alpha=5.0)
    begin = 0
    for n in lengths:
        part = noise[:, begin : begin + n]
        bound = 5 / math.sqrt(n * WIDTH)
        assert part.abs().max() <= bound * (1 + 1e-5)
        assert part.abs().max() > 0.98 * bound
        assert part.mean() == pytest.approx(0, abs=0.03 * bound)
        assert part.var() == pytest.approx(bound**2 / 3, rel=0.05)
        begin += n


def test_a_sample_has_its_noise_wherever_it_is() -> None:
    together = noisy([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]], [7, 9])
    apart = noisy([[0, 1, 2, 3, 4]], [9])
    assert torch.equal(together[1], apart[0])
    assert torch.equal(noisy([[0, 1, 2, 0, 1]], [7])[0], together[0])
    padded = noisy([[0, 1, 2, 0, 1, 0, 1, 2]], [7])  # a further document: padding
    assert torch.equal(padded[0, :5], together[0])
    end_to_end = noisy([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]], [7, 9], device_rows=False)
    assert torch.equal(end_to_end, together), "flash attention's rows"
    assert not torch.equal(noisy([[0, 1, 2, 3, 4]], [9], step=1), apart)


def test_evaluation_has_none() -> None:
    module, callback = Tiny(), NEFTune(NEFTuneConfig())
    it = trainer(module, [0])
    callback.on_setup_end(it)
    module.eval()
    callback.on_micro_batch_start(it, {"position_ids": torch.arange(4)[None]})
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert torch.equal(module.table(ids), torch.nn.functional.embedding(ids, module.table.weight))


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4))
def test_lengths_of_documents(rows: list[list[int]]) -> None:
    width = max(map(sum, rows))
    rows = [[*row, width - sum(row)] if sum(row) < width else row for row in rows]
    positions = torch.tensor([[p for n in row for p in range(n)] for row in rows])
    wanted = [[n for n in row for _ in range(n)] for row in rows]
    assert document_lengths(positions).tolist() == wanted


def test_what_it_refuses() -> None:
    with pytest.raises(RecipeError, match="needs token embeddings"):
        NEFTune(NEFTuneConfig()).on_setup_end(trainer(torch.nn.Linear(2, 2), []))
    with pytest.raises(RecipeError, match="'tabel'"):
        NEFTune(NEFTuneConfig(module="tabel")).on_setup_end(trainer(Tiny(), []))
    module, callback = Tiny(), NEFTune(NEFTuneConfig())
    it = trainer(module, [0, 1])
    callback.on_setup_end(it)
    callback.on_micro_batch_start(it, {"position_ids": torch.arange(4)[None]})
    with pytest.raises(RunError, match="cannot tell which"):
        module.table(torch.zeros(1, 3, dtype=torch.long))
