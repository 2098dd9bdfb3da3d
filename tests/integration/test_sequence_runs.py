"""Ranks that share rows train as one rank does: losses, gradient norms, evaluations, resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import ROOT, blocks

from .test_preference_runs import write_pairs
from .tools import (
    CLOCKS,
    MODEL,
    drive,
    lines,
    recipe,
    train_lines,
    write_conversations,
    write_recipe,
)

STEPS = 20
WINDOW = {**MODEL, "model_type": "mistral", "sliding_window": 20, "num_key_value_heads": 1}
"""One key head for two ranks, and a window shorter than a rank's part."""
PAGE = ROOT / "docs" / "long_context.md"
OTHER = {"config": {**MODEL, "num_hidden_layers": 1}, "dtype": "fp32"}
FOUR = [f"{kind}-four-{stage}" for kind in ("sft", "dpo") for stage in (2, 3)]


class Runs:
    """Recipes by name, launched together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: dict[int, list[dict[str, Any]]] = {}
        self.data = write_conversations(folder / "data.jsonl", count=50)
        self.more = write_conversations(folder / "more.jsonl", count=9, seed=3)
        self.pairs = write_pairs(folder / "pairs.jsonl", count=17)
        write_pairs(folder / "eval.jsonl", count=3, seed=1)
        self.answers = folder / "answers.jsonl"
        with self.answers.open("w") as file:
            for number, row in enumerate(map(json.loads, self.pairs.read_text().splitlines())):
                own = {
                    "prompt": row["prompt"],
                    "completion": row["chosen"],
                    "label": number % 3 > 0,
                }
                file.write(json.dumps(own) + "\n")

    def sft(self, **changes: Any) -> dict[str, Any]:
        """Packed rows whose lengths two does not divide; an evaluation; two sources."""
        own: dict[str, Any] = {
            "data__pack_samples": True, "data__max_length": 111, "train_iters": STEPS,
            "data__sources": [str(self.data), str(self.more)], "data__source_metrics": True,
            "data__eval_sources": [str(self.more)], "eval_interval": 10,
            "micro_batch_size": 2, "global_batch_size": 4, "optimizer__learning_rate": 3e-3,
        }  # fmt: skip
        made = recipe(self.data, **{**own, **changes})
        del made["gradient_accumulation_steps"]
        return made

    def dpo(self, **changes: Any) -> dict[str, Any]:
        """Packed pairs against a reference model of another shape."""
        return self.pairwise(**{"type": "dpo", "ref_model": OTHER, **changes})

    def pairwise(self, **changes: Any) -> dict[str, Any]:
        """Packed pairs."""
        own: dict[str, Any] = {
            "data__type": "dpo", "data__sources": [str(self.pairs)], "data__source_metrics": False,
            "data__eval_sources": [str(self.folder / "eval.jsonl")], "beta": 0.5,
        }  # fmt: skip
        return self.sft(**{**own, **changes})

    def kto(self, **changes: Any) -> dict[str, Any]:
        """Judged answers with mismatched ones beside them, packed."""
        own = {
            "type": "kto", "data__type": "kto", "ref_model": OTHER,
            "data__sources": [str(self.answers)], "data__eval_sources": [str(self.answers)],
        }  # fmt: skip
        return self.pairwise(**{**own, **changes})

    def add(self, name: str, made: dict[str, Any], *, ranks: int = 1, **more: Any) -> None:
        path = write_recipe(self.folder / f"{name}.yaml", made)
        output = more.pop("output_dir", str(self.folder / name))
        self.jobs.setdefault(ranks, []).append({"recipe": str(path), "output_dir": output, **more})

    def pair(self, name: str, made: dict[str, Any], *, ranks: int = 2, stages: Any = (2,)) -> None:
        """On one rank at stage 0, and shared among two at each stage."""
        self.add(f"{name}-one", {**made, "deepspeed": {"zero_optimization": {"stage": 0}}})
        for stage in stages:
            self.share(f"{name}-{stage}", made, stage=stage, ranks=ranks)

    def share(self, name: str, made: dict[str, Any], *, stage: int, ranks: int) -> None:
        """A run whose rows two ranks share; at stage 3 every weight is divided."""
        zero: dict[str, Any] = {"stage": stage}
        if stage == 3:
            zero["stage3_param_persistence_threshold"] = 0
        shared = {"sequence_parallel_size": 2, "deepspeed": {"zero_optimization": zero}}
        self.add(name, {**made, **shared}, ranks=ranks)

    def launch(self) -> None:
        for ranks in sorted(self.jobs):
            drive(self.jobs.pop(ranks), ranks=ranks, folder=self.folder, timeout=1800)

    def same(self, name: str, expected: str, *, steps: int = STEPS, near: float = 1e-5) -> None:
        """Every number of every line but clocks; losses to `near`."""
        ours, theirs = (lines(self.folder / n) for n in (name, expected))
        kinds = [sorted(set(line) - CLOCKS) for line in ours]
        assert kinds == [sorted(set(line) - CLOCKS) for line in theirs]
        assert len(train_lines(self.folder / name)) == steps
        for line, other, keys in zip(ours, theirs, kinds, strict=True):
            for key in keys:
                if isinstance(line[key], int):
                    assert line[key] == other[key], (name, line["step"], key)
                else:
                    absolute = 0.0 if "loss" in key or key == "grad_norm" else near
                    assert line[key] == pytest.approx(other[key], rel=near, abs=absolute), (
                        name, line["step"], key,
                    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """One launch of one rank, one of two."""
    runs = Runs(tmp_path_factory.mktemp("sequence"))
    runs.pair("sft", runs.sft(), stages=(3,))
    runs.pair("dpo", runs.dpo(), stages=(2,))
    runs.launch()
    return runs


@pytest.mark.parametrize("run", ["sft-3", "dpo-2"])
def test_two_ranks_that_share_rows_train_as_one(runs: Runs, run: str) -> None:
    """20 steps of packed rows in float32, with evaluations and the loss of each source."""
    runs.same(run, f"{run.split('-')[0]}-one")


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    # unpacked rows, recomputed activations, micro-batches by tokens
    "recomputed": ("sft", {
        "model__disable_activation_checkpoint": False, "data__pack_samples": False,
        "data__max_tokens_per_batch": 240, "data__balance": True,
        "checkpoint": [{"type": "huggingface", "save_end_of_training": True}],
    }),
    "window": ("sft", {"model__config": WINDOW}),
    "eager window": ("sft", {"model__config": WINDOW, "model__attn_implementation": "eager"}),
    "adapter": ("sft", {"model__peft_config": {"type": "lora", "r": 4, "lora_dropout": 0.0}}),
    "causal": ("sft", {"type": "causal", "data__type": "sft"}),
    "own": ("sft", {
        "type": "own_sft", "code": str(Path(__file__).with_name("own_attention.py")),
        "model": {"type": "own", "dtype": "fp32"},
    }),
    "orpo": ("pairs", {"type": "orpo"}),
    "coupled": ("dpo", {"loss": {"aot": 1.0, "sigmoid": 0.5}}),
    "weighted": ("dpo", {"loss": "bco_pair", "use_weighting": True}),
    "length": ("dpo", {"loss": "ipo", "ld_alpha": 0.5}),
    "table": ("dpo", {"precompute_reference": True}),
    "kto": ("kto", {}),
}  # fmt: skip
VARIANT_STEPS = 6


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What only the full tests look at: variants, four processes, resumes."""
    runs = Runs(tmp_path_factory.mktemp("sequence-more"))
    make = {"sft": runs.sft, "dpo": runs.dpo, "kto": runs.kto, "pairs": runs.pairwise}
    for name, (kind, changes) in VARIANTS.items():
        changes = {"train_iters": VARIANT_STEPS, "eval_interval": 3, **changes}
        runs.pair(
            name, make[kind](**changes), stages=(2, 3) if name in ("adapter", "kto") else (2,)
        )
    asked = [{"type": "exact_match", "source": str(runs.more), "max_new_tokens": 4}]
    runs.pair(
        "answering",
        runs.sft(train_iters=VARIANT_STEPS, eval_interval=3, callbacks=asked),
        stages=(3,),
    )
    focal = runs.folder / "focal.py"
    focal.write_text(next(b.text for b in blocks(PAGE) if b.file == focal.name))
    made = runs.sft(type="focal_shared", code=str(focal), train_iters=VARIANT_STEPS)
    made["data"]["source_metrics"] = False
    runs.pair("focal", made)
    for kind, missing in (("sft", 2), ("dpo", 3)):
        runs.pair(kind, make[kind](), stages=(missing,))
        for stage in (2, 3):
            runs.share(f"{kind}-four-{stage}", make[kind](), stage=stage, ranks=4)
    moving = runs.sft(checkpoint=[{"type": "deepspeed"}])
    moving["deepspeed"] = {"zero_optimization": {"stage": 2}}
    runs.add("moving", {**moving, "sequence_parallel_size": 2, "exit_iteration": 7}, ranks=2)
    on = {"output_dir": str(runs.folder / "moving"), "resume": "latest"}
    runs.add("moving-on", {**moving, "exit_iteration": 13}, ranks=2, **on)
    runs.add("moving-back", {**moving, "sequence_parallel_size": 2}, ranks=2, **on)
    runs.launch()
    return runs


@pytest.mark.full
@pytest.mark.parametrize("name", VARIANTS)
def test_what_shares_rows_trains_as_what_does_not(more_runs: Runs, name: str) -> None:
    for stage in (2, 3) if name in ("adapter", "kto") else (2,):
        more_runs.same(f"{name}-{stage}", f"{name}-one", steps=VARIANT_STEPS)


@pytest.mark.full
def test_ranks_that_share_rows_answer_prompts(more_runs: Runs) -> None:
    """Generation is that of the plain model; at stage 3 all ranks take part."""
    more_runs.same("answering-3", "answering-one", steps=VARIANT_STEPS)
    measured = [line for line in lines(more_runs.folder / "answering-3") if "eval/loss" in line]
    assert [line["step"] for line in measured] == [3, 6]
    assert all("eval/exact_match" in line for line in measured)


@pytest.mark.full
def test_exports_do_not_know_of_it(more_runs: Runs) -> None:
    ours, theirs = (
        next((more_runs.folder / name).glob("exports/*/config.json")).read_text()
        for name in ("recomputed-2", "recomputed-one")
    )
    assert ours == theirs


@pytest.mark.full
def test_the_trainer_on_the_page_shares_rows(more_runs: Runs) -> None:
    more_runs.same("focal-2", "focal-one", steps=VARIANT_STEPS)


@pytest.mark.full
@pytest.mark.parametrize("run", ["sft-2", "dpo-3", *FOUR])
def test_groups_of_ranks_train_as_one_rank(more_runs: Runs, run: str) -> None:
    """Four ranks are two groups with rows of their own."""
    more_runs.same(run, f"{run.split('-')[0]}-one")


@pytest.mark.full
def test_a_run_goes_on_where_ranks_share_no_rows_and_back(more_runs: Runs) -> None:
    """7 steps shared, 6 on two ranks with rows of their own, 7 shared."""
    more_runs.same("moving", "sft-one")
