"""Runs of rewards, steps and judged answers: TRL's losses; the same however a step is divided; resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.tools import train_lines
from tests.methods.runs import (
    DIVISIONS,
    SCORING,
    USUAL,
    WEIGHTS,
    Jobs,
    answers,
    clockless,
    facts,
    initial_model,
    kto,
    like_trl,
    pairs,
    process,
    reward,
    samples_of,
    series,
    solutions,
    trl_losses,
    whole,
    write_rows,
)

pytestmark = pytest.mark.full

DATA = {"pairs": pairs, "solutions": solutions, "answers": answers}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of one rank and one of two, for all runs."""
    folder, data = written(tmp_path_factory)
    of_trl = write_rows(folder / "trl.jsonl", pairs(12, seed=2))
    jobs = Jobs(folder)
    jobs.add_divisions("reward", reward(whole, data["pairs"], center_rewards_coefficient=0.02))
    jobs.add("reward-trl", reward(like_trl, of_trl, center_rewards_coefficient=0.02))
    exporting = [{"type": "huggingface", "save_end_of_training": True}]
    short = {"data__margin": False, "train_iters": 1, "eval_interval": 1}
    jobs.add("no-margins", reward(whole, data["pairs"], **short, checkpoint=exporting))
    jobs.add_divisions("process", process(whole, data["solutions"]), ["two"])
    jobs.add_divisions("kto", kto(whole, data["answers"]))
    jobs.add("alone", kto(whole, data["answers"], coupling="micro_batch", micro_batch_size=3))
    jobs.add("kto-trl", kto_like_trl(data["answers"]))
    jobs.drive()
    return folder


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What only the full tests look at."""
    folder, data = written(tmp_path_factory)
    jobs = Jobs(folder)
    jobs.add_divisions("reward", reward(whole, data["pairs"]), ["fine"])
    jobs.add_divisions("process", process(whole, data["solutions"]), ["fine", "three"])
    jobs.add_divisions("kto", kto(whole, data["answers"]), ["fine"])
    jobs.add_divisions("apo", kto(whole, data["answers"], loss="apo_zero_unpaired"), [*DIVISIONS])
    jobs.add(
        "kto-table", kto(whole, data["answers"], precompute_reference=True, micro_batch_size=3)
    )
    jobs.add("apo-trl", kto_like_trl(data["answers"], loss="apo_zero_unpaired"))
    language_model = kto(whole, data["answers"])
    initial_model(language_model, folder).save_pretrained(folder / "language-model")
    own = {**SCORING, "name_or_path": str(folder / "language-model")}
    del own["config"]
    loaded = reward(whole, data["pairs"], model=own)
    jobs.add_divisions("reward-of", loaded, ["three"])
    for stage, made in ((3, reward(whole, data["pairs"])), (2, kto(whole, data["answers"]))):
        made["deepspeed"]["zero_optimization"]["stage"] = stage
        jobs.add_resumed(f"{made['type']}-resumable", made, ranks=2)
    jobs.drive()
    return folder


def written(factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """(a folder, name → training rows in it; rows for evaluation beside them)."""
    folder, found = factory.mktemp("judged"), {}
    for name, rows in DATA.items():
        found[name] = write_rows(folder / f"{name}.jsonl", rows(11, seed=0))
        write_rows(folder / f"eval-{name}.jsonl", rows(5, seed=1))
    return folder, found


def kto_like_trl(data: Path, **changes: Any) -> dict[str, Any]:
    """The batch is the data set."""
    made = kto(like_trl, data, micro_batch_size=11, global_batch_size=11, **changes)
    del made["gradient_accumulation_steps"]  # follows from the batch sizes
    return made


LOGGED = {
    "reward": ("rewards/chosen", "rewards/margins", "eval/rewards/accuracies"),
    "process": ("accuracy", "eval/accuracy"),
    "kto": ("kl", "rewards/desirable", "rewards/undesirable", "eval/rewards/desirable"),
    "apo": ("rewards/desirable", "logps/undesirable"),
}


def same(other: Path, one: Path) -> None:
    assert len(train_lines(one)) == 4
    for key in ("loss", "grad_norm", "eval/loss"):
        assert len(series(one, key)) > 1
        assert series(other, key) == pytest.approx(series(one, key), rel=1e-5), key
    for key in LOGGED[one.name.partition("-")[0]]:
        assert series(one, key)
        assert series(other, key) == pytest.approx(series(one, key), rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize(
    "run", [*(f"{kind}-{name}" for kind in ("reward", "kto") for name in USUAL), "process-two"]
)
def test_a_step_is_the_same_however_it_is_divided(runs: Path, run: str) -> None:
    same(runs / run, runs / f"{run.partition('-')[0]}-whole")


@pytest.mark.full
@pytest.mark.parametrize(
    "run",
    ["reward-fine", "process-fine", "process-three", "kto-fine", "kto-table"]
    + [f"apo-{name}" for name in DIVISIONS],
)
def test_so_it_is_in_further_divisions(more_runs: Path, run: str) -> None:
    same(more_runs / run, more_runs / f"{run.partition('-')[0]}-whole")


@pytest.mark.full
def test_a_language_model_begins_alike_at_zero_3_with_a_head_drawn_by_name(more_runs: Path) -> None:
    same(more_runs / "reward-of-three", more_runs / "reward-of-whole")
    # the same seed draws the same weights, so a model that is drawn whole begins with them too
    same(more_runs / "reward-of-whole", more_runs / "reward-whole")


@pytest.mark.full
@pytest.mark.parametrize("name", ["reward", "kto"])
def test_a_resumed_run_is_the_run_that_never_stopped(more_runs: Path, name: str) -> None:
    straight, stopped = (
        more_runs / f"{name}-resumable-{which}" for which in ("straight", "stopped")
    )
    assert len(clockless(straight)) > 6
    assert clockless(stopped) == clockless(straight)
    assert facts(stopped)["final"] == facts(straight)["final"]


def test_rewards_losses_are_trls(runs: Path, trl: Any, tmp_path: Path) -> None:
    made = reward(like_trl, runs / "trl.jsonl", center_rewards_coefficient=0.02)
    samples, rows = samples_of(made, tmp_path), []
    for number in (one for step in facts(runs / "reward-trl")["samples"] for one in step):
        sample = samples[number]
        parts = [sample["input_ids"][sample["segment_ids"] == one].tolist() for one in (0, 1)]
        margin = float(sample["margin"][:1].view("float64")[0])
        rows.append({"chosen_ids": parts[0], "rejected_ids": parts[1], "margin": margin})
    expected = trl_losses(
        trl, "Reward", initial_model(made, tmp_path), rows, batch=4, steps=20, folder=tmp_path,
        center_rewards_coefficient=0.02, max_length=None,
    )  # fmt: skip
    found = series(runs / "reward-trl", "loss")
    assert len(found) == 20
    assert found[-1] < found[0]
    assert found == pytest.approx(expected, rel=1e-4)


def test_ktos_losses_are_trls(runs: Path, trl: Any, tmp_path: Path) -> None:
    losses_are_trls(runs, trl, tmp_path, "kto")


@pytest.mark.full
def test_apos_losses_are_trls(more_runs: Path, trl: Any, tmp_path: Path) -> None:
    losses_are_trls(more_runs, trl, tmp_path, "apo")


def losses_are_trls(runs: Path, trl: Any, folder: Path, kind: str) -> None:
    """TRL turns answers within a batch; here the batch is the data set, whose order it takes."""
    loss = {"kto": "kto", "apo": "apo_zero_unpaired"}[kind]
    rows = [
        {
            "prompt": f"<|user|>{row['prompt']}<|end|><|assistant|>", "label": row["label"],
            "completion": row["completion"] + "<|end|>",
        }
        for row in answers(11, seed=0)
    ]  # fmt: skip
    model = initial_model(kto_like_trl(runs / "answers.jsonl", loss=loss), folder)
    expected = trl_losses(
        trl, "KTO", model, rows, batch=11, steps=20, folder=folder, beta=0.5, loss_type=loss,
        reference=copy.deepcopy(model), max_length=None, **WEIGHTS,
    )  # fmt: skip
    found = series(runs / f"{kind}-trl", "loss")
    assert len(found) == 20
    assert found == pytest.approx(expected, rel=1e-4)


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


def test_steps_are_judged_at_their_last_tokens(runs: Path) -> None:
    """The first loss is the mean cross-entropy of transformers' own model, solution by solution."""
    said = train_lines(runs / "process-whole")[0]["steps"]
    assert said == sum(len(row["labels"]) for row in solutions(11, seed=0))
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


def test_a_baseline_of_micro_batches_depends_on_the_division(runs: Path) -> None:
    baselines = series(runs / "kto-whole", "kl")
    assert (baselines[0], len(baselines)) == (0, 4)
    assert max(baselines) > 1e-4
    alone, together = series(runs / "alone", "loss"), series(runs / "kto-whole", "loss")
    assert alone[0] == pytest.approx(together[0], rel=1e-6)  # the policy is the reference still
    assert abs(alone[-1] / together[-1] - 1) > 1e-5


def test_the_loss_falls_and_wanted_answers_win(runs: Path) -> None:
    lines = train_lines(runs / "kto-trl")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.01
    assert lines[-1]["rewards/desirable"] > lines[-1]["rewards/undesirable"]
