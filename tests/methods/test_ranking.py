"""Rankings of several answers: their data, their loss in whole runs, however a step is divided."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from arctic_like import load_recipe
from arctic_like.errors import RecipeError
from arctic_like.tokenizer.byte import byte_tokenizer
from tests.integration.tools import lines, recipe, write_recipe
from tests.methods.runs import (
    SCORING,
    Jobs,
    clockless,
    facts,
    initial_model,
    pairs,
    samples_of,
    series,
    whole,
    words,
    write_rows,
)

pytestmark = pytest.mark.full


def rankings(count: int, *, seed: int, answers: int = 4) -> list[dict[str, Any]]:
    """Rows with answers of different lengths, the best first; the more yes, the better."""
    draw = random.Random(seed)
    return [
        {"prompt": f"{number} {words(draw, 2)}?",
         "answers": [words(draw, 3) + " yes" * (answers - n) for n in range(answers)]}
        for number in range(count)
    ]  # fmt: skip


def ranked(make: Any, data: Path, **changes: Any) -> dict[str, Any]:
    own = {"type": "reward", "model": SCORING, "data__type": "ranking", "data__answers": 4}
    made: dict[str, Any] = make(data, **{**own, **changes})
    made["data"] = {key: value for key, value in made["data"].items() if value is not None}
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rankings.jsonl, and couples.jsonl twice: as pairs, and as rankings of two."""
    folder = tmp_path_factory.mktemp("rankings")
    for name, count, seed in (("", 18, 1), ("eval-", 6, 2)):
        write_rows(folder / f"{name}rankings.jsonl", rankings(count, seed=seed))
        couples = [
            {k: v for k, v in row.items() if k != "margin"} for row in pairs(count, seed=seed)
        ]
        write_rows(folder / f"{name}pairs.jsonl", couples)
        both = [
            {"prompt": row["prompt"], "answers": [row["chosen"], row["rejected"]]}
            for row in couples
        ]
        write_rows(folder / f"{name}couples.jsonl", both)
    return folder


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    jobs = Jobs(tmp_path_factory.mktemp("runs"))
    jobs.add_divisions("ranking", ranked(whole, data / "rankings.jsonl"), ["two"])
    jobs.add(
        "pairwise", ranked(whole, data / "rankings.jsonl", ranking_loss="pairwise", train_iters=1)
    )
    jobs.add("couples", ranked(whole, data / "couples.jsonl", data__answers=2))
    jobs.add("pairs", ranked(whole, data / "pairs.jsonl", data__type="dpo", data__answers=None))
    jobs.drive()
    return jobs.folder


def test_two_ranks_with_packed_rankings_are_one_rank(runs: Path) -> None:
    same(runs / "ranking-whole", runs / "ranking-two")


@pytest.mark.full
def test_so_are_zero_3_and_accumulation_and_a_resumed_run(data: Path, tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    made = ranked(whole, data / "rankings.jsonl")
    jobs.add_divisions("ranking", made, ["fine", "three"])
    jobs.add_resumed("again", made, ranks=2)
    jobs.drive()
    for division in ("fine", "three"):
        same(tmp_path / "ranking-whole", tmp_path / f"ranking-{division}")
    assert clockless(tmp_path / "again-straight") == clockless(tmp_path / "again-stopped")
    finals = [facts(tmp_path / f"again-{name}")["final"] for name in ("straight", "stopped")]
    assert finals[0] == finals[1]


def same(one: Path, other: Path) -> None:
    mine, theirs = clockless(one), clockless(other)
    assert len(mine) == len(theirs) > 4
    for left, right in zip(mine, theirs, strict=True):
        for key in left.keys() - {"epoch", "samples_seen"}:
            assert right[key] == pytest.approx(left[key], rel=2e-4, abs=2e-6), (left["step"], key)


def test_a_ranking_of_two_is_a_pair(runs: Path) -> None:
    for key in ("loss", "eval/loss", "grad_norm", "eval/rewards/accuracies"):
        expected = series(runs / "pairs", key)
        assert series(runs / "couples", key) == pytest.approx(expected, rel=1e-6), key
    assert series(runs / "couples", "rewards/best") == pytest.approx(
        series(runs / "pairs", "rewards/chosen"), rel=1e-6
    )


def test_the_loss_is_the_formula_on_plain_transformers_scores(
    runs: Path, data: Path, tmp_path: Path
) -> None:
    """The first step of Plackett and Luce's loss, and of that of all pairs: answers one by one in float64."""
    made = ranked(whole, data / "rankings.jsonl")
    model, tokenizer = initial_model(made, tmp_path).double().eval(), byte_tokenizer()
    orders, couples, first, in_order = [], [], 0, 0
    rows = [json.loads(line) for line in (data / "rankings.jsonl").open()]
    for row in rows:
        scores = []
        for answer in row["answers"]:
            turns = [("user", row["prompt"]), ("assistant", answer)]
            ids = tokenizer.apply_chat_template(
                [{"role": role, "content": text} for role, text in turns], return_dict=True
            )["input_ids"]
            with torch.no_grad():
                out = model(input_ids=torch.tensor([ids])).logits
            scores.append(float(out[0, 0]))
        left, order = list(scores), 0.0
        for score in scores:
            order -= score - math.log(sum(map(math.exp, left)))
            left.remove(score)
        both = list(itertools.combinations(scores, 2))
        orders.append(order)
        couples.append(sum(math.log1p(math.exp(low - high)) for high, low in both) / len(both))
        first += scores[0] == max(scores)
        in_order += sum(high > low for high, low in both)
    line = next(one for one in lines(runs / "ranking-whole") if "grad_norm" in one)
    assert line["loss"] == pytest.approx(sum(orders) / len(rows), rel=1e-5)
    assert line["rewards/best_first"] == pytest.approx(first / len(rows))
    assert line["rewards/accuracies"] == pytest.approx(in_order / (6 * len(rows)))
    assert series(runs / "pairwise", "loss")[0] == pytest.approx(sum(couples) / len(rows), rel=1e-5)


@pytest.mark.parametrize("column", ["ranks", "scores"])
def test_an_order_may_be_stated(data: Path, tmp_path: Path, column: str) -> None:
    """By ranks from 1, or by scores, of answers in any order: the same samples."""
    draw, rows = random.Random(3), []
    for row in map(json.loads, (data / "rankings.jsonl").open()):
        order = draw.sample(range(4), 4)
        numbers = [place + 1 if column == "ranks" else -1.5 * place for place in order]
        rows.append(
            {
                "prompt": row["prompt"],
                "answers": [row["answers"][n] for n in order],
                column: numbers,
            }
        )
    stated = write_rows(tmp_path / "stated.jsonl", rows)
    write_rows(tmp_path / "eval-stated.jsonl", rows[:2])
    plain = samples_of(ranked(whole, data / "rankings.jsonl"), tmp_path)
    found = samples_of(ranked(whole, stated), tmp_path)
    assert len(found) == len(plain) == 18
    for number in range(18):
        for key in ("input_ids", "segment_ids"):
            assert found[number][key].tolist() == plain[number][key].tolist()
    assert set(plain[0]["segment_ids"].tolist()) == {0, 1, 2, 3}


GOOD = {"prompt": "1?", "answers": ["a", "b", "c", "d"]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answers": ["a", "b", "c"]}, "3 answers; expected are 4"),
        ({"answers": ["a", "b", "a", "d"]}, "the same text in two of its answers"),
        ({"ranks": [1, 2, 2, 3]}, "as good as each other in 'ranks'"),
        ({"scores": [1, 2, 3]}, "'scores'; expected are 4 numbers"),
        ({"ranks": [1, 2, 3, 4], "scores": [4, 3, 2, 1]}, "'ranks' and 'scores'"),
        ({"answers": "a"}, "expected is a list"),
    ],
)  # fmt: skip
def test_rows_that_are_no_rankings_are_named(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [GOOD, {**GOOD, **change}])
    write_rows(tmp_path / "eval-rows.jsonl", [GOOD])
    with pytest.raises(RecipeError) as caught:
        samples_of(ranked(whole, data), tmp_path)
    assert "rows.jsonl:2" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"center_rewards_coefficient": 0.01}, "center_rewards_coefficient"),
        ({"data__type": "dpo", "data__answers": None, "ranking_loss": "pairwise"}, "ranking_loss"),
    ],
)
def test_keys_of_the_other_kind_are_refused(
    data: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    made = ranked(recipe, data / "rankings.jsonl", **changes)
    with pytest.raises(RecipeError, match=said):
        load_recipe(write_recipe(tmp_path / "recipe.yaml", made))
