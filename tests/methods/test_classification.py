"""Classification: one loss at any stage, number of ranks and division; scores of plain transformers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arctic_like import load_recipe, run
from arctic_like.errors import RecipeError
from tests.integration.tools import MODEL, WORDS, recipe, train_lines, write_recipe
from tests.methods.runs import Jobs, initial_model, samples_of, series, whole, words, write_rows

CLASSIFIER = {
    "type": "classifier", "config": MODEL, "dtype": "fp32", "disable_activation_checkpoint": True,
}  # fmt: skip
ENCODER = {
    **CLASSIFIER,
    "config": {
        "model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
}  # fmt: skip
LABELS = ["berg", "floe", "ice"]


def texts(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Texts with one of three labels."""
    draw = random.Random(seed)
    return [{"text": words(draw, 5), "label": LABELS[number % 3]} for number in range(count)]


def several(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Texts with none to three labels."""
    draw = random.Random(seed)
    return [
        {"text": words(draw, 5), "labels": draw.sample(LABELS, number % 4)}
        for number in range(count)
    ]


def sentences(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Words with one of three labels each."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        mine = draw.choices(WORDS, k=draw.randint(1, 6))
        rows.append({"tokens": mine, "tags": [WORDS.index(word) % 3 for word in mine]})
    return rows


def classification(make: Any, data: Path, **changes: Any) -> dict[str, Any]:
    own = {"type": "classification", "model": CLASSIFIER, "data__type": "classification"}
    made: dict[str, Any] = make(data, **{**own, **changes})
    del made["data"]["pack_samples"]
    return made


def divided(made: dict[str, Any], stage: int) -> dict[str, Any]:
    """The same in micro-batches of two."""
    other: dict[str, Any] = json.loads(json.dumps(made)) | {"micro_batch_size": 2}
    other["deepspeed"]["zero_optimization"]["stage"] = stage
    return other


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    """A recipe of each task, with its data."""
    data = {}
    for name, rows in (("one", texts), ("several", several), ("words", sentences)):
        data[name] = write_rows(folder / f"{name}.jsonl", rows(11, seed=0))
        write_rows(folder / f"eval-{name}.jsonl", rows(7, seed=1))
    exporting = [{"type": "huggingface", "save_end_of_training": True}]
    weights = {"ice": 3.0}
    hamming = {"type": "torchmetrics.classification.MultilabelHammingDistance", "num_labels": 3}
    return {
        "one": classification(whole, data["one"], class_weights=weights, checkpoint=exporting),
        "several": classification(
            whole, data["several"], model=ENCODER, multi_label=True, class_weights={"floe": 2.0},
            metrics={"hamming": hamming},
        ),
        "words": classification(whole, data["words"], task="token", model=ENCODER),
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of one rank for all runs."""
    folder = tmp_path_factory.mktemp("classification")
    jobs, made = Jobs(folder), recipes(folder)
    for name, one in made.items():
        jobs.add(f"{name}-whole", one)
    for name in ("one", "words"):
        jobs.add(f"{name}-fine", divided(made[name], 0))
    jobs.drive()
    return folder


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What only the full tests look at."""
    folder = tmp_path_factory.mktemp("more-classification")
    jobs = Jobs(folder)
    for stage, (name, one) in zip((3, 2, 2), recipes(folder).items(), strict=True):
        jobs.add(f"{name}-whole", one)
        jobs.add(f"{name}-two", divided(one, stage), ranks=2)
    jobs.drive()
    return folder


@pytest.mark.parametrize("name", ["one", "words"])
def test_a_step_is_the_same_in_small_micro_batches(runs: Path, name: str) -> None:
    same(runs, name, "fine")


@pytest.mark.full
@pytest.mark.parametrize("name", ["one", "several", "words"])
def test_a_step_is_the_same_on_two_ranks(more_runs: Path, name: str) -> None:
    same(more_runs, name, "two")


def same(runs: Path, name: str, division: str) -> None:
    one, other = runs / f"{name}-whole", runs / f"{name}-{division}"
    assert len(train_lines(one)) == 4
    for key in ("loss", "grad_norm", "accuracy", "eval/loss", "eval/accuracy", "eval/f1"):
        assert len(series(one, key)) > 1, key
        assert series(other, key) == pytest.approx(series(one, key), rel=1e-5), key
    assert len(set(series(one, "loss"))) == 4


def test_one_label_is_transformers_weighted_cross_entropy(runs: Path) -> None:
    made = classification(whole, runs / "one.jsonl", data__labels=LABELS)
    model, losses, over = initial_model(made, runs).eval(), 0.0, 0.0
    assert model.config.id2label == dict(enumerate(LABELS))
    for row in texts(11, seed=0):
        with torch.no_grad():
            logits = model(torch.tensor([list(row["text"].encode())])).logits[0].double()
        weight = 3.0 if row["label"] == "ice" else 1.0
        losses -= weight * float(logits.log_softmax(-1)[LABELS.index(row["label"])])
        over += weight
    assert series(runs / "one-whole", "loss")[0] == pytest.approx(losses / over, rel=1e-5)
    assert train_lines(runs / "one-whole")[0]["labels"] == over


def test_several_labels_are_binary_cross_entropies(runs: Path) -> None:
    made = classification(
        whole, runs / "several.jsonl", data__labels=LABELS, model=ENCODER, multi_label=True
    )
    model, losses = initial_model(made, runs).eval(), []
    assert model.config.problem_type == "multi_label_classification"
    for row in several(11, seed=0):
        ids = torch.tensor([list(row["text"].encode())])
        with torch.no_grad():
            shares = model(ids, attention_mask=torch.ones_like(ids)).logits[0].double().sigmoid()
        for number, label in enumerate(LABELS):
            weight = 2.0 if label == "floe" else 1.0
            there = label in row["labels"]
            losses.append(-weight * shares[number].log() if there else -(1 - shares[number]).log())
    expected = float(torch.stack(losses).mean())
    assert series(runs / "several-whole", "loss")[0] == pytest.approx(expected, rel=1e-5)
    for key in ("eval/hamming", "eval/accuracy"):
        assert series(runs / "several-whole", key)
    shown = series(runs / "several-whole", "eval/hamming")
    right = series(runs / "several-whole", "eval/accuracy")
    assert shown == pytest.approx([1 - one for one in right], abs=1e-6)


def test_words_are_judged_at_their_first_tokens(runs: Path) -> None:
    made = classification(
        whole, runs / "words.jsonl", data__labels=[0, 1, 2], model=ENCODER, task="token"
    )
    model, losses = initial_model(made, runs).eval(), []
    for row in sentences(11, seed=0):
        spelled = [list(word.encode()) for word in row["tokens"]]
        starts = np.cumsum([0, *map(len, spelled)])[:-1]
        ids = torch.tensor([[byte for word in spelled for byte in word]])
        with torch.no_grad():
            logits = model(ids, attention_mask=torch.ones_like(ids)).logits[0].double()
        shares = logits.log_softmax(-1)
        losses += [-float(shares[at, tag]) for at, tag in zip(starts, row["tags"], strict=True)]
    expected = sum(losses) / len(losses)
    assert series(runs / "words-whole", "loss")[0] == pytest.approx(expected, rel=1e-5)
    assert train_lines(runs / "words-whole")[0]["labels"] == len(losses)


def test_an_export_classifies_in_plain_transformers(runs: Path) -> None:
    """Accuracy and F1 of the evaluation set, by scikit-learn, are what the run measured last."""
    metrics = pytest.importorskip("sklearn.metrics")
    from transformers import AutoModelForSequenceClassification

    folder = next((runs / "one-whole" / "exports").glob("step-4"))
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.id2label == dict(enumerate(LABELS))
    rows, found = texts(7, seed=1), []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([list(row["text"].encode())])).logits[0]
        found.append(model.config.id2label[int(logits.argmax())])
    truth = [row["label"] for row in rows]
    measured = [series(runs / "one-whole", key)[-1] for key in ("eval/accuracy", "eval/f1")]
    assert measured[0] == pytest.approx(metrics.accuracy_score(truth, found))
    f1 = metrics.f1_score(truth, found, labels=LABELS, average="macro", zero_division=0)
    assert measured[1] == pytest.approx(f1, rel=1e-6)


def test_labels_are_found_in_the_data_numbers_by_size(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": label} for label in (10, 9, 2)]
    data = write_rows(tmp_path / "texts.jsonl", rows)
    write_rows(tmp_path / "eval-texts.jsonl", rows[:1])
    samples = samples_of(classification(whole, data), tmp_path)
    assert [int(samples[n]["classes_0"][0]) for n in range(3)] == [4, 2, 1]


def test_more_labels_than_bits_have_columns(tmp_path: Path) -> None:
    rows = [{"text": "a", "labels": [0, 61, 62]}, {"text": "b", "labels": list(range(100))}]
    data = write_rows(tmp_path / "texts.jsonl", rows)
    write_rows(tmp_path / "eval-texts.jsonl", rows[:1])
    samples = samples_of(classification(whole, data, multi_label=True), tmp_path)
    first = samples[0]
    assert (int(first["classes_0"][0]), int(first["classes_1"][0])) == (1 + (1 << 61), 1)


@pytest.mark.parametrize(
    ("row", "changes", "said"),
    [
        ({"text": "a"}, {}, ["`label`"]),
        ({"text": "a", "label": None}, {}, ["'label'"]),
        ({"text": "a", "label": "x"}, {"data__labels": LABELS}, ["'x'", "data.labels"]),
        ({"text": "a", "labels": "ice"}, {"multi_label": True}, ["list of labels"]),
        ({"tokens": ["a", "b"], "tags": [1]}, {"task": "token"}, ["2 words and 1 tags"]),
    ],
)
def test_rows_without_labels_are_named(
    tmp_path: Path, row: dict[str, Any], changes: dict[str, Any], said: list[str]
) -> None:
    make = {"multi_label": several, "task": sentences}.get(next(iter(changes), ""), texts)
    rows = make(8, seed=0)
    data = write_rows(tmp_path / "texts.jsonl", [*rows, row])
    write_rows(tmp_path / "eval-texts.jsonl", rows)
    with pytest.raises(RecipeError) as caught:
        samples_of(classification(whole, data, **changes), tmp_path)
    for word in ["texts.jsonl:9", *said]:
        assert word in str(caught.value)


def test_one_label_alone_is_refused(tmp_path: Path) -> None:
    rows = texts(1, seed=0)
    data = write_rows(tmp_path / "texts.jsonl", rows)
    write_rows(tmp_path / "eval-texts.jsonl", rows)
    with pytest.raises(RecipeError, match="one label, 'berg'"):
        samples_of(classification(whole, data), tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "token", "multi_label": True}, ["multi_label"]),
        ({"data__task": "token"}, ["data.task", "sequence"]),
        ({"data__labels": ["a", "a"]}, ["data.labels", "twice"]),
        (
            {"model": {**CLASSIFIER, "peft_config": {"type": "prompt_tuning"}}},
            ["model.peft_config.type", "virtual tokens"],
        ),
        ({"model": {**CLASSIFIER, "type": "huggingface"}}, ["model.type", "classifier"]),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: list[str]
) -> None:
    data = write_rows(tmp_path / "texts.jsonl", texts(4, seed=0))
    made = recipe(data, **{
        "type": "classification", "model": CLASSIFIER, "data__type": "classification", **changes
    })  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path / "recipe.yaml", made))
    for word in said:
        assert word in str(caught.value)


# The recipe -----------------------------------------------------------------------------------------

TINY = Path(__file__).parents[2] / "recipes" / "classification"


def test_the_tiny_recipes_data_is_what_its_script_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(TINY / "make_tiny.py"), str(tmp_path)], check=True)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in TINY.glob("*.jsonl")}
    both = [set(written[name].splitlines()) for name in ("tiny.jsonl", "tiny_heldout.jsonl")]
    assert not both[0] & both[1]


@pytest.mark.full
def test_the_tiny_recipe_labels_held_out_texts(tmp_path: Path) -> None:
    result = run(load_recipe(TINY / "tiny.yaml", [f"output_dir={tmp_path / 'run'}"]))
    assert result.metrics["eval/accuracy"] > 0.9
