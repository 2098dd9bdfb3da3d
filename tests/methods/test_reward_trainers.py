"""Reward models: their scores, their data, what is refused. Whole runs are in test_judged_runs.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arctic_like import load_recipe, run
from arctic_like.errors import RecipeError
from arctic_like.model.scoring import document_scores
from arctic_like.tokenizer.byte import byte_tokenizer
from tests.integration.tools import recipe, write_recipe
from tests.methods.runs import (
    SCORING,
    pairs,
    process,
    reward,
    samples_of,
    solutions,
    whole,
    write_rows,
)


def test_scores_are_those_of_the_last_tokens() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 1, -1], [0, 1, 1, 2, 2, 2]])
    scores = torch.arange(24.0).view(2, 6, 2).requires_grad_()
    found = document_scores(scores, segments, documents=5)
    assert found.tolist() == [[2, 3], [8, 9], [12, 13], [16, 17], [22, 23]]
    (gradient,) = torch.autograd.grad(found[:, 0].sum(), scores)
    assert gradient[..., 0].nonzero().tolist() == [[0, 1], [0, 4], [1, 0], [1, 2], [1, 5]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {**SCORING, "num_labels": 2}}, ["model.num_labels", "a reward is one number"]),
        ({"model": {**SCORING, "type": "huggingface"}}, ["model.type", "scoring"]),
        (
            {"model": {**SCORING, "peft_config": {"type": "prefix_tuning"}}},
            ["model.peft_config.type", "virtual tokens"],
        ),
    ],
    ids=["two scores", "a language model", "virtual tokens"],
)
def test_what_cannot_score_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", pairs(2, seed=0))
    made = {**reward(recipe, data), **changes}
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path / "recipe.yaml", made))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("margin", ["much", None, True, float("inf")])
def test_a_margin_that_is_no_number_is_named(tmp_path: Path, margin: Any) -> None:
    rows = pairs(2, seed=0)
    rows[1]["margin"] = margin
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    write_rows(tmp_path / "eval-pairs.jsonl", rows[:1])
    with pytest.raises(RecipeError, match=r"pairs\.jsonl:2.*'margin'") as caught:
        samples_of(reward(whole, data), tmp_path)
    assert "data.margin" in str(caught.value)


@pytest.mark.parametrize("last_only", [False, True])
def test_labels_are_marks_of_steps(tmp_path: Path, last_only: bool) -> None:
    rows = solutions(6, seed=5)
    rows[0]["prompt"] = [{"role": "user", "content": "why?"}]
    data = write_rows(tmp_path / "solutions.jsonl", rows)
    write_rows(tmp_path / "eval-solutions.jsonl", rows[:1])
    own = {"data__step_separator": " ;", "data__train_on_last_step_only": last_only}
    samples, tokenizer = samples_of(process(whole, data, **own), tmp_path), byte_tokenizer()
    assert len(samples) == 6
    for number, row in enumerate(rows):
        sample = samples[number]
        prompt = "<|user|>why?<|end|><|assistant|>" if number == 0 else row["prompt"]
        text = prompt + "".join(step + " ;" for step in row["completions"])
        assert tokenizer.decode(sample["input_ids"]) == text
        where = np.flatnonzero(sample["labels"] != -100)
        marks = [bool(mark) for mark in sample["labels"][where]]
        expected = row["labels"][-1:] if last_only else row["labels"]
        assert (marks, samples.weights[number]) == (expected, len(expected))
        before = [tokenizer.decode(sample["input_ids"][: end + 1]) for end in where]
        ends = [
            prompt + "".join(step + " ;" for step in row["completions"][: n + 1])
            for n in range(len(row["labels"]))
        ]
        assert before == (ends[-1:] if last_only else ends)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": [True]}, "2 steps and 1 labels"),
        ({"labels": [True, "no"]}, "'labels'"),
        ({"completions": []}, "'completions'"),
        ({"prompt": ""}, "prompt without a token"),
    ],
)
def test_rows_that_are_no_steps_are_named(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    good = {"prompt": "1?", "completions": ["a", "b"], "labels": [True, False]}
    data = write_rows(tmp_path / "solutions.jsonl", [good, {**good, **change}])
    write_rows(tmp_path / "eval-solutions.jsonl", [good])
    with pytest.raises(RecipeError) as caught:
        samples_of(process(whole, data), tmp_path)
    assert "solutions.jsonl:2" in str(caught.value)
    assert said in str(caught.value)


TINY = Path(__file__).parents[2] / "recipes" / "reward"


def test_the_tiny_recipes_data_is_what_its_script_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(TINY / "make_tiny.py"), str(tmp_path)], check=True)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in TINY.glob("*.jsonl")}
    couples = []
    for name in ("tiny_pairs.jsonl", "tiny_heldout_pairs.jsonl"):
        rows = [json.loads(line) for line in written[name].splitlines()]
        couples.append({frozenset(row["prompt"].split()[1:3]) for row in rows})
    assert not couples[0] & couples[1]


@pytest.mark.full
def test_the_tiny_recipe_ranks_held_out_pairs(tmp_path: Path) -> None:
    result = run(load_recipe(TINY / "tiny.yaml", [f"output_dir={tmp_path / 'run'}"]))
    assert result.metrics["eval/rewards/accuracies"] > 0.95
