"""Embeddings: one loss at any stage, number of ranks and division; vectors of plain transformers."""

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
from arctic_like.model.embedding import pooled, text_rows
from tests.integration.tools import MODEL, WORDS, recipe, train_lines, write_recipe
from tests.methods.runs import (
    Jobs,
    clockless,
    facts,
    initial_model,
    samples_of,
    series,
    whole,
    words,
    write_rows,
)

EMBEDDING = {
    "type": "embedding", "config": MODEL, "dtype": "fp32", "disable_activation_checkpoint": True,
    "pooling": "last",
}  # fmt: skip
ENCODER = {
    **EMBEDDING, "pooling": "mean",
    "config": {
        "model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
}  # fmt: skip
FULL = {
    "learn_temperature": True, "temperature": 0.1, "symmetric": True,
    "matryoshka_dims": [8, 32], "matryoshka_weights": [0.5, 1.0],
}  # fmt: skip
DIVISIONS = {"cached": (0, 1, 2), "two": (2, 2, 1), "three": (3, 2, 2)}
"""Name → ZeRO stage, ranks, micro-batch size; beside a run in one micro-batch on one rank."""


def units(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Rows with none to two hard negatives; the first two have one positive, the next one anchor."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        row: dict[str, Any] = {"query": f"{number} {words(draw, 3)}", "positive": words(draw, 6)}
        if number % 3:
            row["negatives"] = [words(draw, 5) for _ in range(number % 3)]
        rows.append(row)
    rows[1]["positive"] = rows[0]["positive"]
    rows[3]["query"] = rows[2]["query"]
    return rows


def embedding(make: Any, data: Path, **changes: Any) -> dict[str, Any]:
    own = {
        "type": "embedding", "model": EMBEDDING, "data__type": "embedding", "data__negatives": 2,
        "data__query_prefix": "q: ", "data__max_length": 48,
    }  # fmt: skip
    made: dict[str, Any] = make(data, **{**own, **changes})
    return made


def add_divisions(jobs: Jobs, name: str, made: dict[str, Any], divisions: list[str]) -> None:
    jobs.add(f"{name}-whole", made)
    for division in divisions:
        stage, ranks, micro = DIVISIONS[division]
        other = json.loads(json.dumps(made)) | {"micro_batch_size": micro}
        other["deepspeed"]["zero_optimization"]["stage"] = stage
        jobs.add(f"{name}-{division}", other, ranks=ranks)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of one rank and one of two, for all runs."""
    folder = tmp_path_factory.mktemp("embeddings")
    data = write_rows(folder / "units.jsonl", units(11, seed=0))
    write_rows(folder / "eval-units.jsonl", units(7, seed=1))
    jobs = Jobs(folder)
    add_divisions(jobs, "full", embedding(whole, data, **FULL), ["cached", "three"])
    exporting = [{"type": "sentence_transformers", "save_end_of_training": True}]
    plain = embedding(whole, data, model=ENCODER, checkpoint=exporting)
    add_divisions(jobs, "encoder", plain, ["two"])
    alone = {"coupling": "micro_batch", "micro_batch_size": 4, "train_iters": 1}
    jobs.add("alone", embedding(whole, data, **alone))
    jobs.drive()
    return folder


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What only the full tests look at."""
    folder = tmp_path_factory.mktemp("more-embeddings")
    data = write_rows(folder / "units.jsonl", units(11, seed=0))
    write_rows(folder / "eval-units.jsonl", units(7, seed=1))
    jobs = Jobs(folder)
    made = embedding(whole, data, **FULL, deepspeed__zero_optimization__stage=3)
    jobs.add_resumed("resumable", made, ranks=2)
    add_divisions(jobs, "full", embedding(whole, data, **FULL), ["two"])
    jobs.drive()
    return folder


@pytest.mark.parametrize("run", ["full-cached", "full-three", "encoder-two"])
def test_a_step_is_the_same_however_it_is_divided(runs: Path, run: str) -> None:
    same(runs, run)


@pytest.mark.full
def test_a_step_with_all_settings_is_the_same_at_stage_two(more_runs: Path) -> None:
    same(more_runs, "full-two")


def same(runs: Path, run: str) -> None:
    """Gradients included: their norm, and what the steps made of the weights."""
    one, other = runs / f"{run.split('-')[0]}-whole", runs / run
    assert len(train_lines(one)) == 4
    assert train_lines(one)[0]["pairs"] == 11
    keys = ["loss", "grad_norm", "accuracy", "eval/loss", "eval/retrieval/ndcg@10"]
    if run.startswith("full"):
        keys += ["temperature", "loss/8", "eval/retrieval/8/mrr@10"]
    for key in keys:
        assert len(series(one, key)) > 1, key
        assert series(other, key) == pytest.approx(series(one, key), rel=1e-5), key
    assert len(set(series(one, "loss"))) == 4


def test_negatives_of_a_micro_batch_alone_are_another_loss(runs: Path) -> None:
    whole_loss = series(runs / "encoder-whole", "loss")[0]
    assert abs(series(runs / "alone", "loss")[0] - whole_loss) > 0.05


@pytest.mark.full
def test_a_resumed_run_is_the_run_that_never_stopped(more_runs: Path) -> None:
    straight = clockless(more_runs / "resumable-straight")
    assert len(straight) > 6
    assert clockless(more_runs / "resumable-stopped") == straight
    digests = [
        facts(more_runs / f"resumable-{which}")["final"] for which in ("straight", "stopped")
    ]
    assert digests[0] == digests[1]


def vector(model: Any, text: str, pooling: str) -> torch.Tensor:
    """A text's vector by transformers alone, in float64, without padding."""
    ids = torch.tensor([list(text.encode())[:48]])
    with torch.no_grad():
        hidden = model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].double()
    found = hidden[-1] if pooling == "last" else hidden.mean(0)
    return found / found.norm()


def by_hand(model: Any, rows: list[dict[str, Any]], pooling: str, dim: int, scale: float,
            symmetric: bool) -> float:  # fmt: skip
    """The mean loss of all rows, pair by pair."""

    def cut(text: str) -> torch.Tensor:
        found = vector(model, text, pooling)[:dim]
        return found / found.norm()

    anchors = [cut("q: " + row["query"]) for row in rows]
    texts = [row["positive"] for row in rows]
    texts += [text for row in rows for text in row.get("negatives", [])]
    vectors = [cut(text) for text in texts]
    known = [
        {other["positive"] for other in rows if other["query"] == row["query"]} for row in rows
    ]
    scores = torch.stack(anchors) @ torch.stack(vectors).T * scale
    total = 0.0
    for i in range(len(rows)):
        kept = [j for j, text in enumerate(texts) if j == i or text not in known[i]]
        loss = -(scores[i, i] - scores[i, kept].logsumexp(0))
        if symmetric:
            own = [j for j in range(len(rows)) if j == i or texts[i] not in known[j]]
            loss = (loss - (scores[i, i] - scores[own, i].logsumexp(0))) / 2
        total += float(loss) / len(rows)
    return total


def test_the_first_losses_are_those_of_plain_transformers(runs: Path) -> None:
    rows = units(11, seed=0)
    made = embedding(whole, runs / "units.jsonl", **FULL)
    model = initial_model(made, runs).eval()
    expected = 0.5 * by_hand(model, rows, "last", 8, 10.0, True)
    expected += by_hand(model, rows, "last", 32, 10.0, True)
    assert series(runs / "full-whole", "loss")[0] == pytest.approx(expected, rel=1e-5)
    made = embedding(whole, runs / "units.jsonl", model=ENCODER)
    model = initial_model(made, runs).eval()
    expected = by_hand(model, rows, "mean", 32, 20.0, False)
    assert series(runs / "encoder-whole", "loss")[0] == pytest.approx(expected, rel=1e-5)


def test_an_export_embeds_as_the_run_did(runs: Path) -> None:
    """Its files say how: recall of the evaluation set by hand is what the run measured last."""
    from transformers import AutoModel

    folder = next((runs / "encoder-whole" / "exports").glob("step-4"))
    parts = json.loads((folder / "modules.json").read_text())
    assert [part["type"].rpartition(".")[2] for part in parts] == [
        "Transformer", "Pooling", "Normalize",
    ]  # fmt: skip
    pooling = json.loads((folder / parts[1]["path"] / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == 32
    assert [key for key, value in pooling.items() if value is True] == [
        "pooling_mode_mean_tokens", "include_prompt",
    ]  # fmt: skip
    whole_config = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert whole_config["prompts"] == {"query": "q: ", "document": ""}
    model, rows = AutoModel.from_pretrained(folder).eval(), units(7, seed=1)
    texts = sorted({t for row in rows for t in [row["positive"], *row.get("negatives", [])]})
    vectors = torch.stack([vector(model, text, "mean") for text in texts])
    found = 0.0
    for row in rows:
        known = {one["positive"] for one in rows if one["query"] == row["query"]}
        best = int((vectors @ vector(model, "q: " + row["query"], "mean")).argmax())
        found += (texts[best] in known) / len(known) / len(rows)
    measured = series(runs / "encoder-whole", "eval/retrieval/recall@1")[-1]
    assert measured == pytest.approx(found)


def test_sentence_transformers_makes_the_same_vectors(runs: Path) -> None:
    package = pytest.importorskip("sentence_transformers")
    from transformers import AutoModel

    folder = next((runs / "encoder-whole" / "exports").glob("step-4"))
    found = package.SentenceTransformer(str(folder), device="cpu")
    vectors = found.encode(["ice", "a longer text of snow"], prompt_name="query")
    plain = AutoModel.from_pretrained(folder).eval()
    for text, one in zip(["q: ice", "q: a longer text of snow"], vectors, strict=True):
        assert one.tolist() == pytest.approx(vector(plain, text, "mean").tolist(), abs=1e-5)


def test_texts_of_a_batch_become_rows() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 1, -1], [0, 1, 1, 1, 1, 2]])
    rows = text_rows(segments)
    assert rows.index.tolist() == [
        [0, 1, 1, 1], [2, 3, 4, 4], [6, 6, 6, 6], [7, 8, 9, 10], [11, 11, 11, 11],
    ]  # fmt: skip
    assert rows.mask.sum(1).tolist() == [2, 3, 1, 4, 1]


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_poolings_are_what_their_names_say(pooling: str) -> None:
    hidden = torch.arange(24.0).view(2, 4, 3)
    found = pooled(hidden, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), pooling)
    places = {"mean": [[0, 1], [0, 1, 2, 3]], "last": [[1], [3]], "cls": [[0], [0]]}[pooling]
    expected = [
        np.mean([hidden[row, one].tolist() for one in places[row]], axis=0) for row in range(2)
    ]
    assert found.tolist() == [one.tolist() for one in expected]


def test_a_cut_text_keeps_its_special_tokens(tmp_path: Path) -> None:
    """As transformers itself cuts it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from arctic_like.registry import build
    from arctic_like.world import World

    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]")
    rows = [{"anchor": " ".join(WORDS), "positive": "ice snow", "negative": " ".join(WORDS[3:])}]
    data = write_rows(tmp_path / "units.jsonl", rows)
    write_rows(tmp_path / "eval-units.jsonl", rows)
    made = embedding(whole, data, data__query_prefix="", data__max_length=6)
    config = load_recipe(write_recipe(tmp_path / "recipe.yaml", made)).config
    factory: Any = build(config.data, "data")
    prepared = factory.build(
        tokenizer=tokenizer, output_dir=tmp_path, seed=0, world=World(), max_positions=64
    )
    sample = prepared.train[0]
    for number, text in enumerate([rows[0]["anchor"], rows[0]["positive"], rows[0]["negative"]]):
        ids = sample["input_ids"][sample["segment_ids"] == number].tolist()
        assert ids == tokenizer(text, truncation=True, max_length=6)["input_ids"]
    assert (prepared.facts["documents"], prepared.facts["truncated"]) == (1, 1)
    assert prepared.train.weights.tolist() == [1]


def test_long_texts_can_go_with_their_unit(tmp_path: Path) -> None:
    rows = units(6, seed=0)
    rows[4]["negatives"] = ["x" * 80]
    data = write_rows(tmp_path / "units.jsonl", rows)
    write_rows(tmp_path / "eval-units.jsonl", rows[:1])
    samples = samples_of(
        embedding(whole, data, data__long_samples="drop", data__max_length=60), tmp_path
    )
    assert [samples.sample_id(n).split(",")[0] for n in range(len(samples))] == [
        f"units.jsonl:{n}" for n in (1, 2, 3, 4, 6)
    ]
    with pytest.raises(RecipeError, match=r"units\.jsonl:5\) has 80"):
        samples_of(
            embedding(whole, data, data__long_samples="error", data__max_length=60), tmp_path
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"negatives": ["a", "b", "c"]}, ["3 hard negatives", "data.negatives"]),
        ({"positive": 3}, ["'positive'", "expected is text"]),
        ({"query": " "}, ["'query'", "expected is text"]),
        ({"query": None}, ["'query'"]),
    ],
)
def test_rows_that_are_no_units_are_named(
    tmp_path: Path, change: dict[str, Any], said: list[str]
) -> None:
    rows = units(4, seed=0)[:2]
    data = write_rows(tmp_path / "units.jsonl", [rows[0], {**rows[1], **change}])
    write_rows(tmp_path / "eval-units.jsonl", rows[:1])
    with pytest.raises(RecipeError) as caught:
        samples_of(embedding(whole, data), tmp_path)
    for words_ in ["units.jsonl:2", *said]:
        assert words_ in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"matryoshka_weights": [1.0]}, ["matryoshka_weights", "1 weights for 0"]),
        ({"matryoshka_dims": [8, 8]}, ["matryoshka_dims", "twice"]),
        ({"model": {**EMBEDDING, "learned_temperature": 0.3}}, ["model.learned_temperature"]),
        (
            {"model": {**EMBEDDING, "peft_config": {"type": "prompt_tuning"}}},
            ["model.peft_config.type", "virtual tokens"],
        ),
        ({"model": {**EMBEDDING, "type": "huggingface"}}, ["model.type", "embedding"]),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: list[str]
) -> None:
    data = write_rows(tmp_path / "units.jsonl", units(4, seed=0))
    made = {**embedding(recipe, data), **changes}
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path / "recipe.yaml", made))
    for words_ in said:
        assert words_ in str(caught.value)


def test_a_folder_that_would_be_read_wrongly_is_refused_before_the_run(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "units.jsonl", units(4, seed=0))
    write_rows(tmp_path / "eval-units.jsonl", units(4, seed=0))
    dora = {"type": "lora", "use_dora": True, "target_modules": ["q_proj"]}
    made = embedding(
        whole, data, model={**EMBEDDING, "peft_config": dora}, output_dir=str(tmp_path / "run"),
        checkpoint=[{"type": "sentence_transformers", "save_end_of_training": True}],
    )  # fmt: skip
    with pytest.raises(RecipeError, match=r"checkpoint\.0\.type.*DoRA"):
        run(load_recipe(write_recipe(tmp_path / "recipe.yaml", made)))


def test_packing_is_refused(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "units.jsonl", units(4, seed=0))
    write_rows(tmp_path / "eval-units.jsonl", units(4, seed=0))
    with pytest.raises(RecipeError, match=r"data\.pack_samples"):
        samples_of(embedding(whole, data, data__pack_samples=True), tmp_path)


# The recipe -----------------------------------------------------------------------------------------

TINY = Path(__file__).parents[2] / "recipes" / "embedding"


def test_the_tiny_recipes_data_is_what_its_script_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(TINY / "make_tiny.py"), str(tmp_path)], check=True)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in TINY.glob("*.jsonl")}
    groups = []
    for name in ("tiny.jsonl", "tiny_heldout.jsonl"):
        rows = [json.loads(line) for line in written[name].splitlines()]
        groups.append({frozenset(row["positive"].split()) for row in rows})
    assert not groups[0] & groups[1]


@pytest.mark.full
def test_the_tiny_recipe_finds_held_out_texts(tmp_path: Path) -> None:
    result = run(load_recipe(TINY / "tiny.yaml", [f"output_dir={tmp_path / 'run'}"]))
    assert result.metrics["eval/retrieval/recall@1"] > 0.9
