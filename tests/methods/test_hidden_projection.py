"""Hidden states of a student and of a wider teacher: the trained map between them, in whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from arctic_like import load_recipe, run
from arctic_like.errors import RecipeError
from arctic_like.inference import load_for_inference
from tests.integration.tools import train_lines, write_conversations, write_recipe
from tests.methods.runs import (
    Jobs,
    clockless,
    facts,
    initial_model,
    samples_of,
    series,
)
from tests.methods.test_distillation import TEACHER, distill

pytestmark = pytest.mark.full

WIDE = {**TEACHER, "config": {**TEACHER["config"], "hidden_size": 48}}
NAMES = {f"hidden_projections.{layer}.weight" for layer in (1, 2)}


def projected(data: Path, **changes: Any) -> dict[str, Any]:
    own = {"hidden_layers": {1: 2, 2: 3}, "hidden_projection": 48, "hidden_weight": 0.5,
           "teacher": {"model": WIDE, "frozen": True}}  # fmt: skip
    return distill(data, **{**own, **changes})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_conversations(folder / "eval-data.jsonl", count=5, seed=1)
    return write_conversations(folder / "data.jsonl", count=11)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """One rank; two at stage 3 over a teacher at stage 3; one at stage 2 that stopped and went on."""
    jobs = Jobs(tmp_path_factory.mktemp("projections"))
    exporting = {"checkpoint": [{"type": "huggingface", "save_end_of_training": True}],
                 "exporters": [{"type": "safetensors"}]}  # fmt: skip
    jobs.add("whole", projected(data, **exporting))
    third = {"zero_optimization": {"stage": 3}}
    divided = {"model": WIDE, "frozen": True, "deepspeed": third}
    jobs.add(
        "two",
        projected(data, micro_batch_size=2, teacher=divided, deepspeed=third, **exporting),
        ranks=2,
    )
    jobs.add_resumed(
        "again", projected(data, deepspeed={"zero_optimization": {"stage": 2}}), ranks=2
    )
    jobs.drive()
    return jobs.folder


def test_two_ranks_at_stage_3_are_one(runs: Path) -> None:
    assert len(train_lines(runs / "whole")) == 3
    for key in ("loss", "grad_norm", "kl", "hidden", "eval/loss", "eval/hidden"):
        assert series(runs / "two", key) == pytest.approx(series(runs / "whole", key), rel=2e-5), (
            key
        )


def test_a_resumed_run_is_the_run_that_never_stopped(runs: Path) -> None:
    assert clockless(runs / "again-straight") == clockless(runs / "again-stopped")
    ends = [facts(runs / f"again-{name}")["final"] for name in ("straight", "stopped")]
    assert ends[0] == ends[1]


def test_the_first_loss_is_the_formula(runs: Path, data: Path) -> None:
    """Place by place on plain models, the maps applied by hand."""
    made = projected(data)
    initial = initial_model(made, runs).eval()
    maps = {layer: initial.get_parameter(f"hidden_projections.{layer}.weight") for layer in (1, 2)}
    assert maps[1].shape == (48, 32)
    assert not torch.equal(maps[1], maps[2])
    teacher = initial_model({**distill(data), "model": WIDE}, runs).eval()
    samples, total, count = samples_of(made, runs), 0.0, 0
    for number in range(len(samples)):
        sample = samples[number]
        ids = torch.from_numpy(sample["input_ids"])[None]
        with torch.no_grad():
            own, theirs = (m(ids, output_hidden_states=True) for m in (initial, teacher))
            for place in range(ids.shape[1] - 1):
                if sample["labels"][place + 1] != -100:
                    count += 1
                    for mine, other in ((1, 2), (2, 3)):
                        a = maps[mine] @ own.hidden_states[mine][0, place]
                        total += (
                            float((a - theirs.hidden_states[other][0, place]).square().mean()) / 2
                        )
    assert series(runs / "whole", "hidden")[0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("name", ["whole", "two"])
def test_exports_have_no_map_and_load_plainly(runs: Path, name: str) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = runs / name / "exports"
    weights = load_file(folder / "step-3" / "model.safetensors")
    assert not any("projection" in key for key in weights)
    _, info = AutoModelForCausalLM.from_pretrained(folder / "step-3", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert load_file(folder / "model.safetensors").keys() == weights.keys()


def test_a_checkpoint_has_the_maps_and_serves(runs: Path) -> None:
    """It holds them trained; a model from it has them, and answers like any other."""
    folder = runs / "again-straight"
    model, _ = load_for_inference(folder / "checkpoints/step-6")
    found = {name: weight for name, weight in model.named_parameters() if "projection" in name}
    assert found.keys() == NAMES
    made = json.loads(json.dumps(projected(folder / "none.jsonl")))
    first = dict(initial_model(made, folder).named_parameters())
    assert all(not torch.equal(found[name], first[name]) for name in NAMES)


def test_an_exported_student_may_be_measured_again(runs: Path, data: Path, tmp_path: Path) -> None:
    """Its weights are taken into a run that has maps, which exports have not."""
    changes: dict[str, Any] = {"train_iters": 1, "eval_at_start": False}
    made = projected(data, **changes, model__weights_from={"path": str(runs / "whole/exports/step-3"),
                                                           "strict": True})  # fmt: skip
    result = run(
        load_recipe(
            write_recipe(tmp_path / "recipe.yaml", made), [f"output_dir={tmp_path / 'run'}"]
        )
    )
    assert result.steps == 1
    last = series(runs / "whole", "eval/cross_entropy")[-1]
    assert series(tmp_path / "run", "cross_entropy")[0] == pytest.approx(last, rel=0.5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_projection": 40}, "states of 40 values with states of 48"),
        ({"hidden_projection": None}, "set hidden_projection: 48"),
        ({"hidden_layers": {}}, "no states are compared"),
        (
            {"model__peft_config": {"type": "lora", "target_modules": "all-linear"}},
            "with an adapter",
        ),
        ({"model__hidden_projections": {1: 3}}, "is the trainer's to set"),
    ],
)
def test_what_does_not_fit_is_refused(
    data: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    made = projected(data, **changes, output_dir=str(tmp_path / "run"))
    with pytest.raises(RecipeError, match=said):
        run(load_recipe(write_recipe(tmp_path / "recipe.yaml", made)))
