"""Every method: the same at ZeRO 2 and 3 on two ranks, in any micro-batch, packed or not; resumed to the bit.

A row of `METHODS` is a recipe whose every step has all rows of its data, so that no division changes what
is in a global batch. What one method alone must show stands in its own file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.tools import CLOCKS, MODEL, lines, train_lines, write_conversations
from tests.methods.runs import (
    SCORING,
    TOKEN_SCORING,
    WEIGHTS,
    Jobs,
    answers,
    clockless,
    facts,
    initial_model,
    pairs,
    series,
    solutions,
    whole,
    write_rows,
)
from tests.methods.test_classification import ENCODER as ENCODING_CLASSIFIER
from tests.methods.test_classification import classification, sentences, several, texts
from tests.methods.test_distillation import HIDDEN, TEACHER
from tests.methods.test_embedding import ENCODER as EMBEDDING_ENCODER
from tests.methods.test_embedding import FULL, embedding, units

Make = Callable[[Path], dict[str, Any]]
LORA = {"type": "lora", "r": 4, "lora_alpha": 16, "target_modules": "all-linear"}


def of(kind: str, rows: str, **changes: Any) -> Make:
    """A trainer whose data is of the given type, over the rows of that name."""

    def make(folder: Path) -> dict[str, Any]:
        own = {"type": kind, **changes}
        return whole(folder / f"{rows}.jsonl", **own)

    return make


def texts_of(maker: Any, rows: str, **changes: Any) -> Make:
    """As `of`, for the tasks whose rows are texts."""
    return lambda folder: maker(whole, folder / f"{rows}.jsonl", **changes)


def adapted(make: Make, base: str = "llama", **config: Any) -> Make:
    """The same with a LoRA adapter over a saved language model, which brings no head."""

    def made(folder: Path) -> dict[str, Any]:
        one = make(folder)
        own = {key: value for key, value in one["model"].items() if key != "config"}
        one["model"] = {
            **own, "name_or_path": str(folder / base), "peft_config": {**LORA, **config},
        }  # fmt: skip
        one["optimizer"]["learning_rate"] = 1e-2
        return one

    return made


def further(make: Make) -> Make:
    """Trained on from the adapter and the head that a folder holds."""

    def made(folder: Path) -> dict[str, Any]:
        one = adapted(make)(folder)
        del one["model"]["peft_config"]
        one["model"]["adapter"] = str(folder / "adapter")
        return one

    return made


DPO = {"data__type": "dpo", "beta": 0.5}
DISTILL = {
    "data__type": "sft", "temperature": 2.0, "distill_weight": 0.7,
    "teacher": {"model": TEACHER, "frozen": True},
}  # fmt: skip
reward = of("reward", "pairs", model=SCORING, data__type="dpo", data__margin=True)
process = of("process_reward", "solutions", model=TOKEN_SCORING, data__type="stepwise")
labels = texts_of(classification, "texts", class_weights={"ice": 3.0})
encoded_labels = texts_of(classification, "texts", model=ENCODING_CLASSIFIER)
METHODS: dict[str, Make] = {
    "sft": of("sft", "conversations"),
    "causal": of("causal", "plain", data__type="causal"),
    "dpo": of("dpo", "pairs", **DPO),
    "dpo-table": of("dpo", "pairs", **DPO, precompute_reference=True),
    "dpo-coupled": of("dpo", "pairs", **DPO, loss={"aot": 1.0, "sft": 0.3}),
    "orpo": of("orpo", "pairs", **DPO),
    "simpo": of("simpo", "pairs", **DPO | {"beta": 2.0}),
    "cpo": of("cpo", "pairs", **DPO),
    "kto": of("kto", "answers", data__type="kto", beta=0.5, **WEIGHTS),
    "reward": reward,
    "process": process,
    "embedding": texts_of(embedding, "units", **FULL),
    # its negatives are the micro-batch's: the same where the division makes the same ones
    "embedding-alone": texts_of(
        embedding,
        "units",
        coupling="micro_batch",
        micro_batch_size=4,
        global_batch_size=8,
        data__drop_last=True,
    ),
    "labels": labels,
    "several": texts_of(classification, "several", model=ENCODING_CLASSIFIER, multi_label=True),
    "words": texts_of(classification, "sentences", model=ENCODING_CLASSIFIER, task="token"),
    "distill": of("distill", "conversations", **DISTILL),
    "distill-hidden": of("distill", "conversations", **DISTILL, **HIDDEN),
    "distill-table": of("distill", "conversations", **DISTILL, teacher_cache={"top_k": 8}),
    "lora-sft": adapted(of("sft", "conversations")),
    "lora-dpo": adapted(of("dpo", "pairs", **DPO)),
    "lora-kto": adapted(of("kto", "answers", data__type="kto", beta=0.5)),
    "lora-reward": adapted(reward),
    "lora-process": adapted(process, use_dora=True),
    "lora-embedding": adapted(texts_of(embedding, "units", **FULL)),
    "lora-encoder": adapted(texts_of(embedding, "units", model=EMBEDDING_ENCODER), "bert"),
    "lora-labels": adapted(labels),
    "lora-pooled": adapted(encoded_labels, "bert"),
    "lora-words": adapted(
        texts_of(classification, "sentences", model=ENCODING_CLASSIFIER, task="token"), "bert"
    ),
    "lora-further": further(reward),
    "lora-distill": adapted(of("distill", "conversations", **DISTILL, **HIDDEN)),
}
# stage, ranks, micro-batch size, packed where the method packs
DIVISIONS = {"fine": (0, 1, 1, True), "two": (2, 2, 2, False), "three": (3, 2, 4, True)}
GROUPS = {
    "language": ["sft", "causal", "distill", "distill-hidden"],
    "tables": ["dpo-table", "distill-table", "embedding-alone"],
    "pairs": ["dpo", "dpo-coupled", "orpo", "simpo", "cpo", "kto"],
    "heads": ["reward", "process", "embedding", "labels", "several", "words"],
    "adapters": ["lora-sft", "lora-dpo", "lora-kto"],
    "adapted-decoders": ["lora-reward", "lora-process", "lora-embedding", "lora-labels"],
    "adapted-encoders": ["lora-encoder", "lora-pooled", "lora-words"],
    "further": ["lora-further", "lora-distill"],
}
ROWS: dict[str, Any] = {
    "pairs": pairs, "answers": answers, "solutions": solutions, "units": units, "texts": texts,
    "several": several, "sentences": sentences,
}  # fmt: skip


def write_everything(folder: Path) -> None:
    """Rows of every kind to train on and to measure, and two models to start from."""
    for name, rows in ROWS.items():
        write_rows(folder / f"{name}.jsonl", rows(11, seed=0))
        write_rows(folder / f"eval-{name}.jsonl", rows(5, seed=1))
    write_conversations(folder / "conversations.jsonl", count=11)
    write_conversations(folder / "eval-conversations.jsonl", count=5, seed=1)
    for prefix, count, seed in (("", 11, 0), ("eval-", 5, 1)):
        rows = [{"text": row["text"] * 2} for row in texts(count, seed=seed)]
        write_rows(folder / f"{prefix}plain.jsonl", rows)
    for name, shape in (("llama", MODEL), ("bert", EMBEDDING_ENCODER["config"])):
        made = METHODS["sft"](folder)
        made["model"]["config"] = shape
        if name == "llama":
            initial_model(made, folder).save_pretrained(folder / name)
        else:
            save_masked(made, folder / name)
    save_adapter(METHODS["lora-reward"](folder), folder / "adapter")


def save_adapter(made: dict[str, Any], folder: Path) -> None:
    """What an earlier run of the recipe might have exported: no weight is what it began with."""
    import torch

    from arctic_like.checkpoint.huggingface import export
    from arctic_like.engine.host import HostGroup
    from arctic_like.model.scoring import ScoringModelConfig, ScoringModelFactory
    from arctic_like.tokenizer.byte import byte_tokenizer
    from arctic_like.world import World

    model = ScoringModelFactory(ScoringModelConfig.model_validate(made["model"])).build(
        tokenizer=byte_tokenizer(), seed=1, world=World(), device="cpu", zero_stage=0, ds_config={}
    )
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    export(model, byte_tokenizer(), directory=folder, host=HostGroup(World()))


def save_masked(made: dict[str, Any], folder: Path) -> None:
    """A masked language model, whose checkpoint has no pooler."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    torch.manual_seed(5)
    shape = AutoConfig.for_model(**made["model"]["config"], vocab_size=262)
    AutoModelForMaskedLM.from_config(shape).save_pretrained(folder)


def add(jobs: Jobs, name: str, divisions: dict[str, tuple[int, int, int, bool]], *, resumed_at: int,
        ranks: int) -> None:  # fmt: skip
    """A method in one micro-batch and in `divisions`; and with dropout, straight and stopped between."""
    made = METHODS[name](jobs.folder)
    jobs.add(f"{name}-whole", made)
    for division, (stage, of_ranks, micro, packed) in divisions.items():
        other = json.loads(json.dumps(made))
        if "pack_samples" in other["data"] and other["type"] != "embedding":
            other["data"]["pack_samples"] = packed
        if name != "embedding-alone":
            other["micro_batch_size"] = micro
        other["deepspeed"]["zero_optimization"]["stage"] = stage
        jobs.add(f"{name}-{division}", other, ranks=of_ranks)
    made = with_dropout(made)
    made["deepspeed"]["zero_optimization"]["stage"] = resumed_at
    made |= {
        "micro_batch_size": 1, "global_batch_size": 4, "train_iters": 6,
        "checkpoint": [{"type": "deepspeed", "save_every_n_steps": 3}],
    }  # fmt: skip
    jobs.add(f"{name}-straight", made, ranks=ranks)
    jobs.add(f"{name}-stopped", {**made, "exit_iteration": 3}, ranks=ranks)
    jobs.add(f"{name}-resumed", made, ranks=ranks, resume="latest",
             output_dir=str(jobs.folder / f"{name}-stopped"))  # fmt: skip


def with_dropout(made: dict[str, Any]) -> dict[str, Any]:
    """Random numbers in the model and in the adapter."""
    other: dict[str, Any] = json.loads(json.dumps(made))
    model = other["model"]
    bert = "bert" in (model.get("name_or_path", ""), model.get("config", {}).get("model_type", ""))
    bert = bert or model.get("name_or_path", "").endswith("bert")
    model["hf_config_kwargs"] = {"hidden_dropout_prob" if bert else "attention_dropout": 0.2}
    if "peft_config" in model:
        model["peft_config"]["lora_dropout"] = 0.1
    return other


class Groups:
    """Each group is run when one of its methods is first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.factory = factory
        self.folders: dict[str, Path] = {}

    def of(self, name: str) -> Path:
        group = next(group for group, names in GROUPS.items() if name in names)
        if group not in self.folders:
            self.folders[group] = self.factory.mktemp(group)
            write_everything(self.folders[group])
            jobs = Jobs(self.folders[group])
            for one in GROUPS[group]:
                add(jobs, one, DIVISIONS, resumed_at=3, ranks=2)
            jobs.drive(timeout=1800)
        return self.folders[group]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Groups:
    return Groups(tmp_path_factory)


def same(one: Path, other: Path) -> None:
    """Losses and norms of all steps to 1e-5, what else is logged to 1e-4."""
    assert len(train_lines(one)) == len(train_lines(other)) == 4
    for key in ("loss", "grad_norm", "eval/loss"):
        expected = series(one, key)
        assert len(expected) > 1
        assert series(other, key) == pytest.approx(expected, rel=1e-5), key
    shown = {key for line in lines(one) for key in line if not key.endswith("_per_second")}
    # a packed sample is several rows; a policy that is its reference wins by rounding or does not
    for key in shown - CLOCKS - {"samples_seen", "rewards/accuracies"}:
        if all(isinstance(value, int | float) for value in series(one, key)):
            expected = pytest.approx(series(one, key), rel=1e-4, abs=2e-6)  # type: ignore[assignment]
            assert series(other, key) == expected, key
    assert len(set(series(one, "loss"))) == 4


def bit_for_bit(straight: Path, stopped: Path) -> None:
    """Every line and every weight."""
    assert len(clockless(straight)) > 6
    assert clockless(stopped) == clockless(straight)
    assert facts(stopped)["final"] == facts(straight)["final"]
    assert facts(straight)["final"] != facts(straight)["initial"]


@pytest.mark.full
@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_the_same_however_it_is_divided(groups: Groups, name: str, division: str) -> None:
    folder = groups.of(name)
    same(folder / f"{name}-whole", folder / f"{name}-{division}")


@pytest.mark.full
@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_the_run_that_never_stopped(groups: Groups, name: str) -> None:
    """On two ranks at ZeRO 3, with dropout."""
    folder = groups.of(name)
    bit_for_bit(folder / f"{name}-straight", folder / f"{name}-stopped")


QUICK = ["cpo", "words", "distill-table", "lora-pooled"]
"""Of every run that no other test of the default suite has."""


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of one rank."""
    folder = tmp_path_factory.mktemp("quick")
    write_everything(folder)
    jobs = Jobs(folder)
    for name in QUICK:
        add(jobs, name, {"fine": DIVISIONS["fine"]}, resumed_at=0, ranks=1)
    jobs.drive()
    return folder


@pytest.mark.parametrize("name", QUICK)
def test_on_one_rank_too(quick: Path, name: str) -> None:
    same(quick / f"{name}-whole", quick / f"{name}-fine")
    bit_for_bit(quick / f"{name}-straight", quick / f"{name}-stopped")
