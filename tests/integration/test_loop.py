"""What a run does besides stepping: lines, evaluation, ends, errors, resuming with changes. One process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arctic_like import Loss, SFTTrainer, load_recipe, run
from arctic_like.api import execute
from arctic_like.callbacks.base import MOMENTS, Callback, CallbackConfig
from arctic_like.errors import NonFiniteError, RecipeError, RunError
from arctic_like.stop import StopRequest

from .tools import lines, recipe, train_lines, write_conversations, write_recipe

Change = Callable[[Any], None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("loop") / "data.jsonl", count=24)


def train(
    folder: Path,
    content: dict[str, Any],
    *overrides: str,
    change: Change | None = None,
    resume: str = "",
) -> Any:
    path = write_recipe(folder / "recipe.yaml", content)
    return execute(
        load_recipe(path, overrides), output_dir=folder / "run", resume=resume, stop=StopRequest(),
        inspect=change,
    )  # fmt: skip


class NaNAt(SFTTrainer):
    """A loss that is NaN at one step."""

    name = "test_nan"
    at = 3

    def loss(self, batch: Any) -> Any:
        loss = super().loss(batch)
        return loss * math.nan if self.module.training and self.global_step + 1 == self.at else loss


class Disagrees(SFTTrainer):
    """Says another weight than `weight(batch)`."""

    name = "test_disagrees"

    def loss(self, batch: Any) -> Any:
        return Loss(super().loss(batch), weight=self.weight(batch) + 1)


class PerSequence(SFTTrainer):
    """A mean over sequences instead of tokens, with a value to log."""

    name = "test_per_sequence"

    def weight(self, batch: Any) -> float:
        return float(batch["labels"].shape[0])

    def loss(self, batch: Any) -> Any:
        import torch.nn.functional as F

        labels = batch["labels"][:, 1:]
        each = F.cross_entropy(
            self.logits(batch)[:, :-1].transpose(1, 2).float(), labels, reduction="none"
        ).sum(1) / (labels != -100).sum(1)
        return Loss(each.mean(), weight=len(each), values={"longest": each.max()})


class Recording(Callback):
    """Notes every moment."""

    name = "test_recording"
    config_type = CallbackConfig
    seen: list[str] = []


def _noting(moment: str) -> Callable[..., None]:
    def note(self: Any, trainer: Any, *values: Any) -> None:
        Recording.seen.append(moment)

    return note


for _moment in MOMENTS:
    setattr(Recording, _moment, _noting(_moment))


class AsksToStop(Callback):
    """Asks to stop after step 2."""

    name = "test_asks_to_stop"
    config_type = CallbackConfig

    def on_step_end(self, trainer: Any) -> None:
        if trainer.global_step == 2:
            trainer.request_stop("callback")


class Breaks(Callback):
    """Has a defect."""

    name = "test_breaks"
    config_type = CallbackConfig

    def on_log(self, trainer: Any, values: dict[str, Any]) -> None:
        raise ZeroDivisionError("a defect in a callback")


@pytest.mark.parametrize("every", [1, 4])
def test_a_nan_ends_the_run_and_spoils_no_checkpoint(
    tmp_path: Path, data: Path, every: int
) -> None:
    """Also where lines are written every fourth step only: the step and its samples are still named."""
    content = recipe(
        data, type="test_nan", train_iters=8, data__pack_samples=False, micro_batch_size=2,
        train_log_iter_interval=every,
        checkpoint=[{"type": "deepspeed", "save_every_n_steps": 2}],
    )  # fmt: skip
    with pytest.raises(NonFiniteError) as caught:
        train(tmp_path, content)
    text = str(caught.value)
    assert "step 3" in text
    assert "step-2" in text
    assert every == 4 or "data.jsonl:" in text
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["latest", "step-2"]
    assert all(line["step"] < 3 for line in train_lines(tmp_path / "run"))


def test_evaluation_is_weighted_by_tokens_and_named(tmp_path: Path, data: Path) -> None:
    """Two named sets, at the start, every 2 steps and at the end; computed here sample by sample."""
    other = write_conversations(tmp_path / "other.jsonl", count=5, seed=9)
    expected: dict[str, float] = {}

    def compute(trainer: Any) -> None:
        import torch

        for name, samples in trainer.equipment.data.evaluation.items():
            total, count = 0.0, 0
            for i in range(len(samples)):
                sample = samples[i]
                logits = trainer.module(input_ids=torch.as_tensor(sample["input_ids"])[None]).logits
                targets = torch.as_tensor(sample["labels"])[1:]
                total += float(
                    torch.nn.functional.cross_entropy(
                        logits[0, :-1], targets, ignore_index=-100, reduction="sum"
                    )
                )
                count += int((targets != -100).sum())
            expected[name] = total / count

    content = recipe(
        data, train_iters=5, micro_batch_size=2, data__pack_samples=False, eval_interval=2,
        eval_at_start=True, eval_at_end=True,
        data__eval_sources={"seen": [str(data)], "unseen": [str(other)]},
    )  # fmt: skip
    train(tmp_path, content, change=compute)
    found = [line for line in lines(tmp_path / "run") if "eval/seen/loss" in line]
    assert [line["step"] for line in found] == [0, 2, 4, 5]
    for name, value in expected.items():
        assert found[0][f"eval/{name}/loss"] == pytest.approx(value, rel=1e-5)


def test_evaluation_changes_nothing_of_the_training(tmp_path: Path, data: Path) -> None:
    shape = {**recipe(data)["model"]["config"], "attention_dropout": 0.3}
    content = recipe(data, train_iters=4, model__config=shape, data__train_eval_split=[0.8, 0.2])
    train(tmp_path / "without", content)
    train(tmp_path / "with", content, "eval_interval=1", "eval_at_start=true")
    losses = [
        [line["loss"] for line in train_lines(tmp_path / n / "run")] for n in ("without", "with")
    ]
    assert losses[0] == losses[1]


def test_the_moments_come_in_the_documented_order(tmp_path: Path, data: Path) -> None:
    Recording.seen.clear()
    content = recipe(
        data, train_iters=2, micro_batch_size=2, gradient_accumulation_steps=2, eval_interval=2,
        data__train_eval_split=[0.9, 0.1], data__pack_samples=False,
        callbacks=[{"type": "test_recording"}],
        checkpoint=[{"type": "deepspeed", "save_end_of_training": True}],
    )  # fmt: skip
    train(tmp_path, content)
    step = [
        "on_step_start", *(["on_micro_batch_start", "on_micro_batch_end"] * 2),
        "on_gradients_ready", "on_optimizer_step_start", "on_optimizer_step_end", "on_step_end",
        "on_log",
    ]  # fmt: skip
    parts = ["on_part_start", "on_part_end"]
    evaluation = [m for m in Recording.seen if "evaluate_batch" in m]
    assert evaluation == ["on_evaluate_batch_start", "on_evaluate_batch_end"] * (
        len(evaluation) // 2
    )
    assert [m for m in Recording.seen if "evaluate_batch" not in m] == [
        "on_run_start", "on_setup_start", *parts * 6, "on_setup_end", "on_train_start",
        "on_epoch_start", *step, *step, "on_evaluate_start", "on_evaluate_end",
        "on_checkpoint_start", "on_checkpoint_end", "on_train_end", "on_run_end",
    ]  # fmt: skip


def test_the_ways_to_end_early(tmp_path: Path, data: Path) -> None:
    content = recipe(data, train_iters=6, checkpoint=[{"type": "deepspeed"}])
    switch = tmp_path / "stop-now"
    switch.touch()
    for name, reason, steps, overrides in (
        ("exit", "exit_iteration", 3, ["exit_iteration=3"]),
        ("here", "exit_iteration", 2, ["exit_iteration_this_run=2"]),
        ("asked", "callback", 2, ["callbacks=[{type: test_asks_to_stop}]"]),
        ("switch", "kill_switch", 0, [f"kill_switch_path={switch}"]),
    ):
        result = train(tmp_path / name, content, *overrides)
        assert (result.stop_reason, result.steps) == (reason, steps), name
        assert result.checkpoint.name == f"step-{steps}", "what was done is saved"
        whole = [
            1e-2 * r for r in (1.0, *(0.5 * (1 + math.cos(math.pi * s / 6)) for s in range(1, 6)))
        ]
        rates = (
            [line["learning_rate"] for line in train_lines(tmp_path / name / "run")]
            if steps
            else []
        )
        assert rates == pytest.approx(whole[:steps]), "the schedule is that of the whole run"


def test_horizon_min_iterations_and_the_first_batch_again(tmp_path: Path, data: Path) -> None:
    content = recipe(data, epochs=1, train_iters=0, micro_batch_size=8, data__pack_samples=False)
    assert train(tmp_path / "epochs", content).steps == 3
    assert train(tmp_path / "least", content, "min_iterations=5").steps == 5
    assert train(tmp_path / "iters", content, "train_iters=2", "epochs=9").steps == 2
    train(tmp_path / "again", content, "overfit_first_batch=true", "train_iters=12")
    again = train_lines(tmp_path / "again" / "run")
    assert len({line["tokens"] for line in again}) == 1
    assert again[-1]["loss"] < 0.8 * again[0]["loss"]


def test_lines_every_third_step_carry_the_weighted_mean(tmp_path: Path, data: Path) -> None:
    content = recipe(data, train_iters=6, data__pack_samples=False, micro_batch_size=2)
    train(tmp_path / "each", content)
    train(tmp_path / "third", content, "train_log_iter_interval=3")
    each, third = (train_lines(tmp_path / n / "run") for n in ("each", "third"))
    assert [line["step"] for line in third] == [3, 6]
    for number, line in enumerate(third):
        part = each[3 * number : 3 * number + 3]
        mean = sum(p["loss"] * p["tokens"] for p in part) / sum(p["tokens"] for p in part)
        assert line["loss"] == pytest.approx(mean, rel=1e-12)


def test_an_epoch_leaves_its_mean_train_loss(tmp_path: Path, data: Path) -> None:
    content = recipe(data, epochs=2, train_iters=0, micro_batch_size=8, data__pack_samples=False)
    train(tmp_path, content)
    each = train_lines(tmp_path / "run")
    ends = [line for line in lines(tmp_path / "run") if "epoch_train_loss" in line]
    assert [line["epoch"] for line in ends] == [1.0, 2.0]
    for number, end in enumerate(ends):
        part = each[3 * number : 3 * number + 3]
        mean = sum(p["loss"] * p["tokens"] for p in part) / sum(p["tokens"] for p in part)
        assert end["epoch_train_loss"] == pytest.approx(mean, rel=1e-12)


def test_own_weight_and_values(tmp_path: Path, data: Path) -> None:
    """A mean over sequences is accumulation-invariant as well, and its values are logged."""
    content = recipe(data, type="test_per_sequence", train_iters=3, data__pack_samples=False)
    train(tmp_path / "a", content, "micro_batch_size=6")
    train(tmp_path / "b", content, "micro_batch_size=1", "gradient_accumulation_steps=6")
    for one, other in zip(*(train_lines(tmp_path / n / "run") for n in "ab"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        assert one["tokens"] == 6
        assert one["longest"] >= one["loss"]


def test_a_weight_that_disagrees_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(RunError, match=r"weight\(batch\)"):
        train(tmp_path, recipe(data, type="test_disagrees"))


def test_a_defect_in_a_callback_names_it(tmp_path: Path, data: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        train(tmp_path, recipe(data, callbacks=[{"type": "test_breaks"}]))
    assert caught.value.__notes__ == ["in callback 'test_breaks' at on_log"]


def test_a_run_over_a_run_is_refused_and_overwritten_on_request(tmp_path: Path, data: Path) -> None:
    content = recipe(data, train_iters=2)
    train(tmp_path, content)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(RecipeError) as caught:
        train(tmp_path, content)
    for way in ("arctic-train resume", "output_dir", "overwrite=true"):
        assert way in str(caught.value)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    train(tmp_path, content, "overwrite=true", "train_iters=3")
    assert [line["step"] for line in train_lines(tmp_path / "run")] == [1, 2, 3]


def test_resuming_with_a_changed_recipe(tmp_path: Path, data: Path) -> None:
    content = recipe(
        data, train_iters=4, checkpoint=[{"type": "deepspeed", "save_every_n_steps": 2}]
    )
    train(tmp_path, content)
    for override in ("seed=8", "model.dtype=bf16", "data.max_length=64", "optimizer.type=cpu_adam"):
        with pytest.raises(RecipeError) as caught:
            train(tmp_path, content, override, resume="latest")
        assert override.partition("=")[0] in str(caught.value)
        assert "allow_changes" in str(caught.value)
    result = train(tmp_path, content, "train_iters=6", "optimizer.weight_decay=0", resume="latest")
    assert result.steps == 6
    assert [line["step"] for line in train_lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    again = train(tmp_path, content, resume="step-2")
    assert again.steps == 4
    assert [line["step"] for line in train_lines(tmp_path / "run")] == [1, 2, 3, 4]
    assert again.checkpoint is not None
    assert again.checkpoint.name == "step-4"


def test_a_damaged_checkpoint_is_named_and_an_unfinished_one_ignored(
    tmp_path: Path, data: Path
) -> None:
    content = recipe(
        data, train_iters=4, checkpoint=[{"type": "deepspeed", "save_every_n_steps": 2}]
    )
    train(tmp_path, content)
    newest = tmp_path / "run/checkpoints/step-4"
    weights = newest / "engine/mp_rank_00_model_states.pt"
    content_before = weights.read_bytes()
    middle = len(content_before) // 2
    flipped = bytes([content_before[middle] ^ 1])
    weights.write_bytes(content_before[:middle] + flipped + content_before[middle + 1 :])
    with pytest.raises(RunError, match="mp_rank_00_model_states"):
        train(tmp_path, content, "train_iters=5", resume="latest")
    (newest / "complete.json").unlink()
    assert train(tmp_path, content, resume="latest").steps == 4
    assert (newest / "complete.json").exists(), "step 4 was done again from step 2"


def test_run_works_several_times_and_returns_what_it_came_to(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = recipe(data, train_iters=3, eval_at_end=True, data__train_eval_split=[0.8, 0.2])
    path = write_recipe(tmp_path / "twice.yaml", content)
    results = [run(load_recipe(path), output_dir=name) for name in ("one", "two")]
    assert [line["loss"] for line in train_lines(tmp_path / "one")] == [
        line["loss"] for line in train_lines(tmp_path / "two")
    ]
    for result in results:
        assert result.steps == 3
        assert result.stop_reason == "finished"
        assert result.metrics["eval/loss"] == result.best["eval/loss"]
        assert result.checkpoint is None
    environment = json.loads((tmp_path / "one/environment.json").read_text())
    assert environment["starts"][0]["world_size"] == 1


def test_nothing_to_train_is_said_before_anything_is_written(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    silent = tmp_path / "silent.jsonl"
    silent.write_text(json.dumps({"messages": [{"role": "user", "content": "hello?"}]}) + "\n")
    for source in (empty, silent):
        with pytest.raises(RecipeError) as caught:
            train(tmp_path, recipe(source))
        assert source.name in str(caught.value)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    ],
    ids=["optimizer", "optimizer and parameters"],
)
def test_offload_gives_the_same_run_and_resumes(
    tmp_path: Path, data: Path, zero: dict[str, Any]
) -> None:
    saving = [{"type": "deepspeed", "save_every_n_steps": 2}]
    content = recipe(data, train_iters=5, micro_batch_size=2, checkpoint=saving)
    train(tmp_path / "plain", content)
    content["deepspeed"] = {"zero_optimization": zero}
    train(tmp_path / "offload", content)
    train(tmp_path / "cut", content, "exit_iteration=3")
    train(tmp_path / "cut", content, resume="latest")
    plain, offload, cut = (train_lines(tmp_path / n / "run") for n in ("plain", "offload", "cut"))
    for one, other, third in zip(plain, offload, cut, strict=True):
        for key in ("loss", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-5)
            assert third[key] == other[key]


@pytest.mark.parametrize(
    "stage", [0, 3, *(pytest.param(s, marks=pytest.mark.full) for s in (1, 2))]
)
def test_bf16_resumes_to_the_bit(tmp_path: Path, data: Path, stage: int) -> None:
    shape = {**recipe(data)["model"]["config"], "attention_dropout": 0.2}
    content = recipe(
        data, train_iters=6, micro_batch_size=2, gradient_accumulation_steps=2, model__dtype="bf16",
        model__config=shape, deepspeed__zero_optimization__stage=stage,
        checkpoint=[{"type": "deepspeed", "save_every_n_steps": 2}],
    )  # fmt: skip
    train(tmp_path / "straight", content)
    train(tmp_path / "cut", content, "exit_iteration=5")
    train(tmp_path / "cut", content, resume="step-4")
    assert [(x["loss"], x["grad_norm"]) for x in train_lines(tmp_path / "cut/run")] == [
        (x["loss"], x["grad_norm"]) for x in train_lines(tmp_path / "straight/run")
    ]
