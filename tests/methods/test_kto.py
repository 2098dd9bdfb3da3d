"""KTO: its data's mismatched answers; TRL's losses; the same however a step is divided; resumed runs."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_like import load_recipe
from arctic_like.data.mismatched import with_mismatched
from arctic_like.data.packing import Pieces
from arctic_like.errors import RecipeError
from arctic_like.tokenizer.byte import byte_tokenizer
from tests.integration.tools import recipe, train_lines, write_recipe
from tests.methods.runs import (
    DIVISIONS,
    Jobs,
    clockless,
    facts,
    initial_model,
    like_trl,
    samples_of,
    series,
    trl_losses,
    whole,
    words,
    write_rows,
)

WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.8}


def answers(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Judged answers of different lengths; a wanted one ends in yes."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        wanted = number % 3 > 0
        answer = words(draw, 6) + (" yes" if wanted else "")
        prompt = f"{number} {words(draw, 3)}?"
        rows.append({"prompt": prompt, "completion": answer, "label": wanted})
    return rows


def kto(make: Any, data: Path, **changes: Any) -> dict[str, Any]:
    own = {"type": "kto", "data__type": "kto", "beta": 0.5, **WEIGHTS}
    made: dict[str, Any] = make(data, **{**own, **changes})
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of one rank and one of two, for all runs."""
    folder = tmp_path_factory.mktemp("kto")
    data = write_rows(folder / "answers.jsonl", answers(11, seed=0))
    write_rows(folder / "eval-answers.jsonl", answers(5, seed=1))
    jobs = Jobs(folder)
    jobs.add_divisions("kto", kto(whole, data))
    small = {"micro_batch_size": 3}
    jobs.add("apo-whole", kto(whole, data, loss="apo_zero_unpaired"))
    jobs.add("apo-two", kto(whole, data, loss="apo_zero_unpaired", **small), ranks=2)
    jobs.add("alone", kto(whole, data, coupling="micro_batch", **small))
    jobs.add("table", kto(whole, data, precompute_reference=True, **small))
    one_batch = {"micro_batch_size": 11, "global_batch_size": 11}
    jobs.add("like-trl", without(kto(like_trl, data, **one_batch)))
    resumable = kto(whole, data, deepspeed__zero_optimization__stage=2)
    jobs.add_resumed("resumable", resumable, ranks=2)
    jobs.drive()
    return folder


def without(made: dict[str, Any]) -> dict[str, Any]:
    """Accumulation follows from the batch sizes."""
    del made["gradient_accumulation_steps"]
    return made


@pytest.mark.parametrize("division", DIVISIONS)
def test_a_step_is_the_same_however_it_is_divided(runs: Path, division: str) -> None:
    same(runs / f"kto-{division}", runs / "kto-whole")
    baselines = series(runs / "kto-whole", "kl")
    assert len(baselines) == 4
    assert max(baselines) > 1e-4


def test_apo_is_the_same_on_two_ranks(runs: Path) -> None:
    same(runs / "apo-two", runs / "apo-whole")
    assert not series(runs / "apo-whole", "kl")


def test_a_precomputed_reference_is_the_model(runs: Path) -> None:
    same(runs / "table", runs / "kto-whole")


def same(other: Path, one: Path) -> None:
    assert len(train_lines(one)) == 4
    for key in ("loss", "grad_norm", "eval/loss"):
        assert len(series(one, key)) > 1
        assert series(other, key) == pytest.approx(series(one, key), rel=1e-5), key
    for key in ("rewards/desirable", "rewards/undesirable", "kl", "eval/rewards/desirable"):
        assert series(other, key) == pytest.approx(series(one, key), rel=1e-3, abs=1e-6), key


def test_a_baseline_of_micro_batches_depends_on_the_division(runs: Path) -> None:
    alone, together = series(runs / "alone", "loss"), series(runs / "kto-whole", "loss")
    assert alone[0] == pytest.approx(together[0], rel=1e-6)  # the policy is the reference still
    assert abs(alone[-1] / together[-1] - 1) > 1e-5


def test_the_loss_falls_and_wanted_answers_win(runs: Path) -> None:
    lines = train_lines(runs / "like-trl")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.01
    assert lines[-1]["rewards/desirable"] > lines[-1]["rewards/undesirable"]


@pytest.mark.parametrize("loss", ["kto", pytest.param("apo_zero_unpaired", marks=pytest.mark.full)])
def test_losses_are_trls(runs: Path, trl: Any, tmp_path: Path, loss: str) -> None:
    """TRL turns answers within a batch; here the batch is the data set, whose order it takes."""
    made = without(
        kto(like_trl, runs / "answers.jsonl", micro_batch_size=11, global_batch_size=11, loss=loss)
    )
    run = runs / "like-trl"
    if loss != "kto":
        jobs = Jobs(tmp_path)
        jobs.add("apo", made)
        jobs.drive()
        run = tmp_path / "apo"
    rows = [
        {
            "prompt": f"<|user|>{row['prompt']}<|end|><|assistant|>", "label": row["label"],
            "completion": row["completion"] + "<|end|>",
        }
        for row in answers(11, seed=0)
    ]  # fmt: skip
    model = initial_model(made, tmp_path)
    expected = trl_losses(
        trl, "KTO", model, rows, batch=11, steps=20, folder=tmp_path, beta=0.5, loss_type=loss,
        reference=copy.deepcopy(model), max_length=None, **WEIGHTS,
    )  # fmt: skip
    found = series(run, "loss")
    assert len(found) == 20
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_resumed_run_is_the_run_that_never_stopped(runs: Path) -> None:
    straight = clockless(runs / "resumable-straight")
    assert len(straight) > 6
    assert clockless(runs / "resumable-stopped") == straight
    digests = [facts(runs / f"resumable-{which}")["final"] for which in ("straight", "stopped")]
    assert digests[0] == digests[1]


# Data -----------------------------------------------------------------------------------------------


def documents(sample: dict[str, Any]) -> list[tuple[str, str]]:
    """(text, what of it is trained) of each document; positions count from 0 in each."""
    found, tokenizer = [], byte_tokenizer()
    segments = sample["segment_ids"]
    for number in range(segments.max() + 1):
        mine = segments == number
        ids, labels = sample["input_ids"][mine], sample["labels"][mine]
        assert sample["position_ids"][mine].tolist() == list(range(mine.sum()))
        assert (labels[labels != -100] == ids[labels != -100]).all()
        found.append((tokenizer.decode(ids), tokenizer.decode(labels[labels != -100])))
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_a_prompt_has_the_answer_of_the_row_before(tmp_path: Path, packed: bool) -> None:
    rows = answers(7, seed=3)
    data = write_rows(tmp_path / "answers.jsonl", rows)
    write_rows(tmp_path / "eval-answers.jsonl", rows[:2])
    samples = samples_of(kto(whole, data, data__pack_samples=packed), tmp_path)
    found, wanted = [], []
    for number in range(len(samples)):
        sample = samples[number]
        units = documents(sample)
        found += list(zip(units[0::2], units[1::2], strict=True))
        assert samples.weights[number] == len(units) / 2
        assert samples.lengths[number] == len(sample["input_ids"]) == len(sample["desirable"])
        wanted += [
            bool(sample["desirable"][sample["segment_ids"] == 2 * unit].all())
            for unit in range(len(units) // 2)
        ]
        for unit in range(len(units) // 2):
            pair = (sample["segment_ids"] // 2) == unit
            assert len(set(sample["desirable"][pair].tolist())) == 1
    expected = []
    for number, row in enumerate(rows):
        prompt = f"<|user|>{row['prompt']}<|end|><|assistant|>"
        both = (row["completion"] + "<|end|>", rows[number - 1]["completion"] + "<|end|>")
        expected.append(tuple((prompt + answer, answer) for answer in both))
    assert sorted(found) == sorted(expected)
    assert sorted(zip(found, wanted, strict=True)) == sorted(
        (unit, row["label"]) for unit, row in zip(expected, rows, strict=True)
    )
    assert packed == (len(samples) < 7)


def test_rows_that_are_dropped_lend_no_answer(tmp_path: Path) -> None:
    rows = answers(5, seed=4)
    rows[2]["completion"] = "long " * 40
    data = write_rows(tmp_path / "answers.jsonl", rows)
    write_rows(tmp_path / "eval-answers.jsonl", rows[:2])
    samples = samples_of(kto(whole, data), tmp_path)
    other = documents(samples[2])[1][1]
    assert (len(samples), other) == (4, rows[1]["completion"] + "<|end|>")


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=9),
    st.integers(18, 30),
)  # fmt: skip
def test_other_answers_fit_and_lose_only_their_end(
    units: list[tuple[int, int, int]], most: int
) -> None:
    """units: (tokens cut from the start, tokens of the prompt that are left, tokens of the answer)."""
    cut, prompt, answer = (np.array(part) for part in zip(*units, strict=True))
    judged = Pieces(np.arange(len(units)) * 2, cut, prompt + answer)
    found, shortened = with_mismatched(judged, cut + prompt, max_length=most)
    expected = []
    for number in range(len(units)):
        other = number - 1 if number else len(units) - 1
        taken = min(int(answer[other]), most - int(prompt[number]))
        expected += [
            (number * 2, int(cut[number]), int(prompt[number] + answer[number])),
            (number * 2, int(cut[number]), int(prompt[number])),
            (other * 2, int(cut[other] + prompt[other]), taken),
        ]
    assert list(zip(found.document, found.start, found.length, strict=True)) == expected
    assert shortened == sum(
        1 for number in range(len(units)) if prompt[number] + answer[number - 1] > most
    )


@pytest.mark.parametrize(
    ("changes", "words_of_it"),
    [
        ({"data__kl_answers": False}, ["data.kl_answers", "needs answers of other rows"]),
        ({"data__kl_answers": True, "loss": "apo_zero_unpaired"}, ["data.kl_answers", "no use"]),
        ({"loss": "kot"}, ["loss", "kto"]),
        ({"ref_model": {"config": {"model_type": "llama"}}, "reference": {}}, ["keep reference"]),
    ],
)
def test_contradictions_are_named(
    tmp_path: Path, changes: dict[str, Any], words_of_it: list[str]
) -> None:
    data = write_rows(tmp_path / "answers.jsonl", answers(4, seed=0))
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path / "recipe.yaml", kto(recipe, data, **changes)))
    for word in words_of_it:
        assert word in str(caught.value)


@pytest.mark.parametrize(("loss", "needs"), [("kto", True), ("apo_zero_unpaired", False)])
def test_the_loss_decides_on_other_answers_and_is_written_out_alone(
    tmp_path: Path, loss: str, needs: bool
) -> None:
    data = write_rows(tmp_path / "answers.jsonl", answers(4, seed=0))
    path = write_recipe(tmp_path / "recipe.yaml", kto(recipe, data, loss=loss))
    found = load_recipe(path)
    assert found.config.data.kl_answers is needs
    assert "kl_answers" not in str(found.dump())
