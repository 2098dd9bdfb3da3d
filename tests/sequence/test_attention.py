"""Attention that ranks share is plain attention over whole rows, gradients included."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from arctic_like import load_recipe
from arctic_like.sequence import SequenceGroup, block_mask, borders_of, ulysses
from arctic_like.sequence.rows import padded
from arctic_like.world import World
from tests.integration.tools import environment, free_port
from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "long_context.md"
CASES = ("plain", "grouped", "one key head", "three key heads", "wide values", "window", "sums")


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Two processes over gloo."""
    out = tmp_path_factory.mktemp("attention") / "apart.json"
    script = str(Path(__file__).with_name("ranks_probe.py"))
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(out)], env=environment(RANK=str(rank), **shared)
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    return dict(json.loads(out.read_text()))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_attend_as_one(apart: dict[str, list[float]], case: str) -> None:
    """float64: the output, then the gradients of query, key and value."""
    assert max(apart[case]) < 1e-12
    assert len(apart[case]) == (2 if case == "sums" else 4)


def test_heads_that_cannot_be_shared_are_refused() -> None:
    group = SequenceGroup(rank=0, size=2)
    x = torch.zeros(1, 3, 4, 8)
    with pytest.raises(ValueError, match="3 attention heads cannot be shared among 2 ranks"):
        ulysses(lambda q, k, v: q, x, x, x, group=group)


def test_the_attention_on_the_page_is_causal_within_documents() -> None:
    """Alone a rank has whole rows; the launch above has the exchange."""
    names: dict[str, Any] = {}
    exec(next(b.text for b in blocks(PAGE) if b.file == "attention.py"), names)
    q, k, v = torch.randn(3, 1, 2, 6, 4, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    found = names["shared_attention"](q, k, v, borders=borders_of(positions), group=SequenceGroup())
    halves = [
        F.scaled_dot_product_attention(*(x[:, :, part] for x in (q, k, v)), is_causal=True)
        for part in (slice(3), slice(3, 6))
    ]
    assert torch.allclose(found, torch.cat(halves, dim=2), atol=1e-12)


def test_the_recipe_on_the_page_validates(tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text("")
    page = tmp_path / "long.yaml"
    page.write_text(next(b.text for b in blocks(PAGE) if b.file == "long.yaml"))
    assert load_recipe(page).config.sequence_parallel_size == 4


def test_borders_are_where_positions_do_not_go_on() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [4, 5, 9, 10, 0, 1]])
    assert borders_of(positions).tolist() == [0, 3, 5, 6, 8, 10, 12]
    assert borders_of(positions).dtype == torch.int32


def test_padding_belongs_to_the_document_before_it() -> None:
    positions = torch.tensor([[0, 1, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5]])
    labels = torch.tensor([[-100, 7, -100, 7, -100, -100], [-100, 7, -100, -100, -100, -100]])
    assert borders_of(positions, labels).tolist() == [0, 2, 6, 12]
    untrained = torch.full_like(labels, -100)
    assert borders_of(positions, untrained).tolist() == [0, 6, 12]


def test_a_mask_is_who_sees_whom() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    borders = borders_of(positions)
    for window in (None, 2, 9):
        mask = block_mask(borders, rows=2, length=5, window=window)
        assert mask is not None
        for row in range(2):
            for query in range(5):
                seen = [k for k in range(5) if mask[row, 0, query, k]]
                first = query - int(positions[row, query])
                first = max(first, query - window + 1) if window else first
                assert seen == list(range(first, query + 1))


def test_rows_of_one_document_need_no_mask() -> None:
    borders = borders_of(torch.arange(6).expand(2, 6))
    assert block_mask(borders, rows=2, length=6) is None
    assert block_mask(borders, rows=2, length=6, window=6) is None
    assert block_mask(borders, rows=2, length=6, window=5) is not None


def test_rows_are_padded_to_whole_parts() -> None:
    batch = {
        "input_ids": torch.ones(2, 5, dtype=torch.long),
        "labels": torch.ones(2, 5, dtype=torch.long),
        "position_ids": torch.arange(5).expand(2, 5),
        "segment_ids": torch.zeros(2, 5, dtype=torch.long),
        "other": torch.ones(2),
    }
    longer = padded(batch, 4)
    assert {name: tuple(value.shape) for name, value in longer.items()} == {
        "input_ids": (2, 8), "labels": (2, 8), "position_ids": (2, 8), "segment_ids": (2, 8),
        "other": (2,),
    }  # fmt: skip
    assert longer["labels"][:, 5:].unique().tolist() == [-100]
    assert longer["segment_ids"][:, 5:].unique().tolist() == [-1]
    assert longer["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert padded(batch, 5)["input_ids"] is batch["input_ids"]


def test_ranks_stand_in_groups_of_neighbours() -> None:
    worlds = [World(rank=rank, size=6, sequence_parallel_size=2) for rank in range(6)]
    assert [w.data_rank for w in worlds] == [0, 0, 1, 1, 2, 2]
    assert [w.sequence_rank for w in worlds] == [0, 1] * 3
    assert [w.counts for w in worlds] == [True, False] * 3
    assert {w.data_size for w in worlds} == {3}
