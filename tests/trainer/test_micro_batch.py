"""`micro_batch_size: auto`: what is chosen, and that nothing else of the run is changed by choosing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_like import load_recipe
from arctic_like.api import execute
from arctic_like.errors import RecipeError
from arctic_like.stop import StopRequest
from arctic_like.trainer import micro_batch
from arctic_like.trainer.micro_batch import GAIN, SPARE, Tried, choose
from arctic_like.world import World
from tests.integration.tools import (
    drive,
    recipe,
    train_lines,
    without_clocks,
    write_conversations,
    write_recipe,
)

AUTO: dict[str, Any] = {"micro_batch_size": "auto", "global_batch_size": 8}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("auto") / "data.jsonl", count=40)


def content(data: Path, **changes: Any) -> dict[str, Any]:
    made = recipe(data, data__pack_samples=False, train_iters=6, **changes)
    del made["gradient_accumulation_steps"]
    return made


def go(path: Path, run: Path, *overrides: str, resume: str = "") -> None:
    execute(load_recipe(path, overrides), output_dir=run, resume=resume, stop=StopRequest())


SIZES = [1, 2, 4, 8, 16, 32]


def device(*, fixed: float, each: float, limit: float, overhead: float) -> Any:
    """Memory: fixed + each · rows. Time of 32 samples: a cost for each call, and one for each sample."""
    asked: list[int] = []

    def attempt(rows: int) -> Tried:
        asked.append(rows)
        return Tried(rows, 32 / rows * overhead + 32.0, fixed + each * rows, limit, fixed)

    attempt.asked = asked  # type: ignore[attr-defined]
    return attempt


@given(
    fixed=st.floats(0, 50), each=st.floats(0.01, 20), limit=st.floats(25, 400),
    overhead=st.floats(0, 10),
)  # fmt: skip
def test_nothing_is_tried_that_would_not_fit(
    fixed: float, each: float, limit: float, overhead: float
) -> None:
    attempt = device(fixed=fixed, each=each, limit=limit, overhead=overhead)
    best = choose(SIZES, attempt)
    tried = list(attempt.asked)
    assert tried == SIZES[: len(tried)]
    for rows in tried[1:]:
        assert fixed + each * rows <= SPARE * limit + 1e-6
    assert best.rows in tried
    assert all(attempt(rows).seconds >= best.seconds * GAIN - 1e-9 for rows in tried)


def test_it_goes_on_while_it_gains() -> None:
    plenty = device(fixed=1, each=0.1, limit=1000, overhead=10)
    assert choose(SIZES, plenty).rows == 32
    flat = device(fixed=1, each=0.1, limit=1000, overhead=0)
    assert choose(SIZES, flat).rows == 1
    assert flat.asked == [1, 2]
    # 42 and 47 are below nine tenths of 55, 57 is not
    tight = device(fixed=37, each=5, limit=55, overhead=10)
    assert choose(SIZES, tight).rows == 2


def test_a_run_is_the_run_with_the_number(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, dropout included, and so is a resume, which asks the checkpoint."""
    monkeypatch.setattr(micro_batch, "choose", _fourfold)
    made = content(
        data, **AUTO, checkpoint=[{"type": "deepspeed", "save_every_n_steps": 3}],
        model__config={**recipe(data)["model"]["config"], "attention_dropout": 0.2},
        deepspeed__zero_optimization__stage=2,
    )  # fmt: skip
    path = write_recipe(tmp_path / "recipe.yaml", made)
    go(path, tmp_path / "stated", "micro_batch_size=4")
    go(path, tmp_path / "auto")
    assert without_clocks(tmp_path / "auto") == without_clocks(tmp_path / "stated")
    assert "micro_batch_size: auto" in (tmp_path / "auto/recipe.yaml").read_text()
    go(path, tmp_path / "cut", "exit_iteration=3")
    monkeypatch.setattr(micro_batch, "choose", lambda *_: pytest.fail("tried again"))
    go(path, tmp_path / "cut", resume="latest")
    assert without_clocks(tmp_path / "cut") == without_clocks(tmp_path / "stated")


def test_a_resume_takes_the_size_where_ranks_hold_what_they_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that has another part of layers or rows has room for other rows."""
    state: dict[str, Any] = {"world_size": 4, "tensor_parallel_size": 2, "micro_batch_size": 8}
    monkeypatch.setattr("arctic_like.trainer.saver.saved_state", lambda _: state)

    def known(**world: int) -> int:
        session: Any = SimpleNamespace(resume=tmp_path, world=World(**world))
        return micro_batch._saved(session)

    assert known(size=4, tensor_parallel_size=2) == 8
    assert known(size=4, tensor_parallel_size=4) == known(size=4) == 0
    assert known(size=2, tensor_parallel_size=2) == 0
    assert known(size=4, tensor_parallel_size=2, sequence_parallel_size=2) == 0


def _fourfold(sizes: list[int], attempt: Any, told: Any) -> Tried:
    found = {rows: attempt(rows) for rows in sizes}
    assert sizes == [1, 2, 4, 8]
    assert all(one.seconds > 0 and 0 < one.peak < one.limit for one in found.values())
    return found[4]


@pytest.mark.full
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_on_two_ranks_it_is_the_same_training(tmp_path: Path, data: Path, method: str) -> None:
    """Losses and gradient norms of the run with one row at once, at ZeRO 3."""
    changes: dict[str, Any] = {"deepspeed__zero_optimization__stage": 3}
    if method == "dpo":
        from tests.integration.test_preference_runs import write_pairs

        data = write_pairs(tmp_path / "pairs.jsonl", count=24)
        changes |= {"type": "dpo", "beta": 0.5}
    runs = {}
    for name, size in (("auto", "auto"), ("one", 1)):
        made = content(data, **{**AUTO, "micro_batch_size": size}, **changes)
        path = write_recipe(tmp_path / f"{name}.yaml", made)
        runs[name] = {"recipe": str(path), "output_dir": str(tmp_path / name)}
    drive(list(runs.values()), ranks=2, folder=tmp_path)
    auto, one = (train_lines(tmp_path / name) for name in runs)
    assert [x["loss"] for x in auto] == pytest.approx([x["loss"] for x in one], rel=1e-5)
    assert [x["grad_norm"] for x in auto] == pytest.approx([x["grad_norm"] for x in one], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"micro_batch_size": "auto"}, "global_batch_size is not stated"),
        ({**AUTO, "gradient_accumulation_steps": 2}, "leave gradient_accumulation_steps out"),
        ({**AUTO, "data__max_tokens_per_batch": 512}, "how much is computed at once"),
        ({**AUTO, "data__streaming": True}, "a stream cannot be looked through"),
        ({"micro_batch_size": "fast", "global_batch_size": 8}, "auto"),
    ],
)
def test_what_cannot_be_tried_is_refused(
    tmp_path: Path, data: Path, changes: dict[str, Any], reason: str
) -> None:
    made = content(data)
    stated = recipe(data, **changes)
    made |= {k: stated[k] for k in ("micro_batch_size", "data")}
    made |= {k: changes[k] for k in ("global_batch_size", "gradient_accumulation_steps")
             if k in changes}  # fmt: skip
    with pytest.raises(RecipeError, match=f"(?s)micro_batch_size.*{reason}"):
        load_recipe(write_recipe(tmp_path / "recipe.yaml", made))
