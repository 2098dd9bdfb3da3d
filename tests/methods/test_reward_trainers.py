"""Reward models: TRL's losses; the same at any stage, number of ranks and division, packed or resumed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arctic_like import load_recipe
from arctic_like.errors import RecipeError
from arctic_like.model.scoring import document_scores
from arctic_like.tokenizer.byte import byte_tokenizer
from tests.integration.tools import MODEL, recipe, train_lines, write_recipe
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

SCORING = {
    "type": "scoring",
    "config": MODEL,
    "dtype": "fp32",
    "disable_activation_checkpoint": True,
}


def pairs(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Pairs whose answers differ in length, with a margin."""
    draw = random.Random(seed)
    return [
        {
            "prompt": f"{number} {words(draw, 2)}?", "chosen": words(draw, 6) + " yes",
            "rejected": words(draw, 6), "margin": round(draw.uniform(-0.5, 2), 3),
        }
        for number in range(count)
    ]  # fmt: skip


def reward(make: Any, data: Path, **changes: Any) -> dict[str, Any]:
    own = {"type": "reward", "model": SCORING, "data__type": "dpo", "data__margin": True}
    made: dict[str, Any] = make(data, **{**own, **changes})
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of one rank and one of two, for all runs."""
    folder = tmp_path_factory.mktemp("rewards")
    data = write_rows(folder / "pairs.jsonl", pairs(11, seed=0))
    write_rows(folder / "eval-pairs.jsonl", pairs(5, seed=1))
    of_trl = write_rows(folder / "trl.jsonl", pairs(12, seed=2))
    jobs = Jobs(folder)
    jobs.add_divisions("reward", reward(whole, data, center_rewards_coefficient=0.02))
    jobs.add("like-trl", reward(like_trl, of_trl, center_rewards_coefficient=0.02))
    resumable = reward(whole, data, deepspeed__zero_optimization__stage=3)
    jobs.add_resumed("resumable", resumable, ranks=2)
    exporting = [{"type": "huggingface", "save_end_of_training": True}]
    short = {"data__margin": False, "train_iters": 1, "eval_interval": 1}
    short = reward(whole, data, **short, checkpoint=exporting)
    jobs.add("no-margins", short)
    marked = write_rows(folder / "solutions.jsonl", solutions(11, seed=0))
    write_rows(folder / "eval-solutions.jsonl", solutions(5, seed=1))
    jobs.add_divisions("process", process(whole, marked))
    jobs.drive()
    return folder


@pytest.mark.parametrize("division", DIVISIONS)
def test_a_step_is_the_same_however_it_is_divided(runs: Path, division: str) -> None:
    one, other = runs / "reward-whole", runs / f"reward-{division}"
    assert len(train_lines(one)) == 4
    for key in ("loss", "grad_norm", "eval/loss"):
        assert len(series(one, key)) > 1
        assert series(other, key) == pytest.approx(series(one, key), rel=1e-5), key
    for key in (
        "rewards/chosen",
        "rewards/margins",
        "rewards/accuracies",
        "eval/rewards/accuracies",
    ):
        assert series(one, key)
        assert series(other, key) == pytest.approx(series(one, key), rel=1e-4, abs=1e-6), key


def test_losses_are_trls(runs: Path, trl: Any, tmp_path: Path) -> None:
    made = reward(like_trl, runs / "trl.jsonl", center_rewards_coefficient=0.02)
    samples, rows = samples_of(made, tmp_path), []
    for number in (one for step in facts(runs / "like-trl")["samples"] for one in step):
        sample = samples[number]
        parts = [sample["input_ids"][sample["segment_ids"] == one].tolist() for one in (0, 1)]
        margin = float(sample["margin"][:1].view("float64")[0])
        rows.append({"chosen_ids": parts[0], "rejected_ids": parts[1], "margin": margin})
    expected = trl_losses(
        trl, "Reward", initial_model(made, tmp_path), rows, batch=4, steps=20, folder=tmp_path,
        center_rewards_coefficient=0.02, max_length=None,
    )  # fmt: skip
    found = series(runs / "like-trl", "loss")
    assert len(found) == 20
    assert found[-1] < found[0]
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_resumed_run_is_the_run_that_never_stopped(runs: Path) -> None:
    straight = clockless(runs / "resumable-straight")
    assert len(straight) > 6
    assert clockless(runs / "resumable-stopped") == straight
    digests = [facts(runs / f"resumable-{which}")["final"] for which in ("straight", "stopped")]
    assert digests[0] == digests[1]


def test_margins_of_rows_count(runs: Path) -> None:
    """Without them the first loss is another; with them it is the mean over pairs by hand."""
    made = reward(whole, runs / "pairs.jsonl")
    samples, model = samples_of(made, runs), initial_model(made, runs)
    losses = {True: 0.0, False: 0.0}
    for number, row in enumerate(pairs(11, seed=0)):
        sample = samples[number]
        parts = [torch.tensor(sample["input_ids"][sample["segment_ids"] == one]) for one in (0, 1)]
        with torch.no_grad():
            chosen, rejected = (float(model(part[None]).logits) for part in parts)
        for counted in losses:
            apart = torch.tensor(chosen - rejected - (row["margin"] if counted else 0))
            losses[counted] += float(torch.log1p(torch.exp(-apart))) / 11
            if counted:
                total = torch.tensor(chosen + rejected)
                losses[True] += 0.02 * float(total**2) / 11
    assert series(runs / "reward-whole", "loss")[0] == pytest.approx(losses[True], rel=1e-5)
    assert series(runs / "no-margins", "loss")[0] == pytest.approx(losses[False], rel=1e-5)


def test_an_export_scores_in_plain_transformers(runs: Path) -> None:
    """Its pooled score is that of the last token; the evaluation of the weights is by those scores."""
    from transformers import AutoModelForSequenceClassification

    folder = next((runs / "no-margins" / "exports").glob("step-1"))
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert (type(model).__name__, model.config.num_labels) == ("LlamaForSequenceClassification", 1)
    made = reward(whole, runs / "pairs.jsonl", data__sources=[str(runs / "eval-pairs.jsonl")])
    samples = samples_of(made, runs)
    margins = []
    for number in range(5):
        sample = samples[number]
        parts = [sample["input_ids"][sample["segment_ids"] == one].tolist() for one in (0, 1)]
        longest = max(map(len, parts))
        padded = torch.tensor([part + [256] * (longest - len(part)) for part in parts])
        mask = torch.tensor([[1] * len(part) + [0] * (longest - len(part)) for part in parts])
        with torch.no_grad():
            scores = model(padded, attention_mask=mask).logits[:, 0]
        margins.append(float(scores[0] - scores[1]))
    expected = sum(margins) / 5
    assert series(runs / "no-margins", "eval/rewards/margins")[-1] == pytest.approx(
        expected, rel=1e-4
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
        ({"model": {**SCORING, "peft_config": {"type": "lora"}}}, ["model.peft_config"]),
    ],
    ids=["two scores", "a language model", "an adapter"],
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


# Steps ----------------------------------------------------------------------------------------------

TOKEN_SCORING = {**SCORING, "type": "token_scoring"}


def solutions(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Solutions of one to four steps; the right ones end in ok."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        labels = [draw.random() < 0.6 for _ in range(draw.randint(1, 4))]
        steps = [words(draw, 3) + (" ok" if right else "") for right in labels]
        rows.append({"prompt": f"{number}?", "completions": steps, "labels": labels})
    return rows


def process(make: Any, data: Path, **changes: Any) -> dict[str, Any]:
    own = {"type": "process_reward", "model": TOKEN_SCORING, "data__type": "stepwise"}
    made: dict[str, Any] = make(data, **{**own, **changes})
    return made


@pytest.mark.parametrize("division", DIVISIONS)
def test_a_step_of_steps_is_the_same_however_it_is_divided(runs: Path, division: str) -> None:
    one, other = runs / "process-whole", runs / f"process-{division}"
    assert train_lines(one)[0]["steps"] == sum(len(row["labels"]) for row in solutions(11, seed=0))
    for key in ("loss", "grad_norm", "eval/loss", "accuracy"):
        assert len(series(one, key)) > 1
        assert series(other, key) == pytest.approx(series(one, key), rel=1e-5), key


def test_steps_are_judged_at_their_last_tokens(runs: Path) -> None:
    """The first loss is the mean cross-entropy of transformers' own model, solution by solution."""
    made = process(whole, runs / "solutions.jsonl")
    model, losses = initial_model(made, runs).eval(), []
    for row in solutions(11, seed=0):
        text, ends = row["prompt"].encode(), []
        for step in row["completions"]:
            text += step.encode() + b"\n"
            ends.append(len(text) - 1)
        with torch.no_grad():
            logits = model(torch.tensor([list(text)])).logits[0, ends].double()
        labels = torch.tensor(row["labels"]).long()
        losses += (-logits.log_softmax(-1)[torch.arange(len(labels)), labels]).tolist()
    expected = sum(losses) / len(losses)
    assert series(runs / "process-whole", "loss")[0] == pytest.approx(expected, rel=1e-5)


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
