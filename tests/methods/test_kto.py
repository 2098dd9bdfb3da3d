"""KTO: its mismatched answers, and what is refused. Whole runs are in test_judged_runs.py."""

from __future__ import annotations

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
from tests.integration.tools import recipe, write_recipe
from tests.methods.runs import answers, kto, samples_of, whole, write_rows


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
