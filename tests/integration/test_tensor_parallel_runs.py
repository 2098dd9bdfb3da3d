"""Ranks that share layers train as one rank does: losses, gradients, evaluations, exports, resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .test_sequence_runs import STEPS, Runs
from .tools import MODEL, train_lines, without_clocks

QWEN3 = {**MODEL, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True}
"""Norms of heads, whose gradients are sums over ranks; a head that is the embedding."""
QWEN2 = {**MODEL, "model_type": "qwen2", "num_key_value_heads": 4}
"""Biases of the first projections."""
BIASES = {**MODEL, "attention_bias": True, "mlp_bias": True}
"""Biases of the last ones, which are added once."""
MISTRAL = {**MODEL, "model_type": "mistral", "sliding_window": 20}
REFERENCE = {"config": {**MODEL, "num_hidden_layers": 1}, "dtype": "fp32"}
SAVED: list[dict[str, Any]] = [
    {"type": "deepspeed", "save_end_of_training": True},
    {"type": "huggingface", "save_end_of_training": True},
]
LOOKED_AT = [{"type": "histograms", "every_n_steps": 5}]
"""The norm of every parameter and of every gradient, whole, in the lines."""


class Divided(Runs):
    """Recipes whose ranks share layers."""

    def sft(self, **changes: Any) -> dict[str, Any]:
        """Packed rows, accumulation, an evaluation, recomputed activations."""
        own = {"model__disable_activation_checkpoint": False, "micro_batch_size": 1}
        return super().sft(**{**own, **changes})

    def dpo(self, **changes: Any) -> dict[str, Any]:
        return super().dpo(**{"ref_model": REFERENCE, **changes})

    def share(
        self, name: str, made: dict[str, Any], *, stage: int, ranks: int, size: int = 2, **more: Any
    ) -> None:
        zero: dict[str, Any] = {"stage": stage}
        if stage == 3:
            zero["stage3_param_persistence_threshold"] = 0
        section = {"zero_optimization": zero}
        if size > 1:
            section["tensor_parallel"] = {"autotp_size": size}
        self.add(name, {**made, "deepspeed": section}, ranks=ranks, **more)

    def facts(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / name / "facts.json").read_text())
        return found

    def weights(self, name: str) -> dict[str, Any]:
        """Of the last export."""
        from safetensors.torch import load_file

        return load_file(next((self.folder / name).glob("exports/*/model.safetensors")))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Divided:
    """One launch of one rank, one of two."""
    runs = Divided(tmp_path_factory.mktemp("divided"))
    made = runs.sft(model__config=QWEN3, checkpoint=SAVED, callbacks=LOOKED_AT)
    runs.pair("sft", made, stages=(2,))
    runs.pair("dpo", runs.dpo(), stages=(3,))
    runs.share("cut", {**made, "exit_iteration": 13}, stage=2, ranks=2)
    on = {"output_dir": str(runs.folder / "cut"), "resume": "latest"}
    runs.share("cut-on", made, stage=2, ranks=2, **on)
    runs.launch()
    return runs


@pytest.mark.parametrize("run", ["sft-2", "dpo-3"])
def test_two_ranks_that_share_layers_train_as_one(runs: Divided, run: str) -> None:
    """20 steps in float32 from the same weights: losses, norms, evaluations; the norm of every whole
    gradient and weight."""
    runs.same(run, f"{run.split('-')[0]}-one")
    assert runs.facts(run)["initial"] == runs.facts(f"{run.split('-')[0]}-one")["initial"]


def test_an_export_has_whole_weights(runs: Divided) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ours, theirs = runs.weights("sft-2"), runs.weights("sft-one")
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-5)
    folder = next((runs.folder / "sft-2").glob("exports/*"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(
        dict(model.named_parameters())["model.norm.weight"], ours["model.norm.weight"]
    )


def test_a_resume_at_the_same_degree_is_the_uninterrupted_run_to_the_bit(runs: Divided) -> None:
    assert without_clocks(runs.folder / "cut") == without_clocks(runs.folder / "sft-2")
    assert runs.facts("cut")["final"] == runs.facts("sft-2")["final"]


def test_the_weights_of_a_checkpoint_are_whole(runs: Divided) -> None:
    """`export`, `chat` and `merge` read a checkpoint in one process."""
    import torch

    from arctic_like.inference import load_for_inference

    model, _ = load_for_inference(runs.folder / "sft-2")
    found = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in runs.weights("sft-2").items():
        assert torch.equal(found[name], weight), name


MATRIX: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "llama": ("sft", {"checkpoint": SAVED}, (0, 1, 2, 3)),
    "qwen3": ("sft", {"model__config": QWEN3, "callbacks": LOOKED_AT}, (0, 1, 3)),
    "qwen2": ("sft", {"model__config": QWEN2}, (2, 3)),
    "biases": ("sft", {"model__config": BIASES}, (2, 3)),
    "mistral": ("sft", {"model__config": MISTRAL, "model__attn_implementation": "eager"}, (2,)),
    "unpacked": ("sft", {
        "data__pack_samples": False, "data__max_tokens_per_batch": 240, "data__balance": True,
        "model__disable_activation_checkpoint": True,
    }, (2,)),
    "groups": ("sft", {"callbacks": [
        {"type": "freeze", "match": "q_proj|norm", "until": 3}, {"type": "neftune"},
    ]}, (2, 3)),
    "dpo": ("dpo", {}, (0, 1, 2)),
    "reference of the policy": ("dpo", {"ref_model": None, "model__config": QWEN3}, (3,)),
    "table": ("dpo", {"precompute_reference": True}, (2, 3)),
    "kto": ("kto", {"ref_model": REFERENCE}, (2,)),
    "orpo": ("pairs", {"type": "orpo"}, (2,)),
    "coupled": ("dpo", {"loss": {"aot": 1.0, "sigmoid": 0.5}}, (2,)),
}  # fmt: skip
VARIANT_STEPS = 6
FOUR = [(kind, stage) for kind in ("llama", "dpo") for stage in (2, 3)]
PAIRS = [(name, stage) for name, (_, _, stages) in MATRIX.items() for stage in stages]


def _steps(name: str) -> int:
    return STEPS if name in ("llama", "dpo") else VARIANT_STEPS


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory: pytest.TempPathFactory) -> Divided:
    """What only the full tests look at: stages, architectures, four processes, other degrees."""
    runs = Divided(tmp_path_factory.mktemp("divided-more"))
    make = {"sft": runs.sft, "dpo": runs.dpo, "kto": runs.kto, "pairs": runs.pairwise}
    for name, (kind, changes, stages) in MATRIX.items():
        short = {"train_iters": VARIANT_STEPS, "eval_interval": 3} if _steps(name) != STEPS else {}
        made = make[kind](**{**short, **changes})
        runs.pair(name, made, stages=stages)
        for stage in (2, 3) if name in ("llama", "dpo") else ():
            runs.share(f"{name}-four-{stage}", made, stage=stage, ranks=4)
    made = runs.sft(model__dtype="bf16", train_iters=VARIANT_STEPS)
    for stage in (2, 3):
        runs.share(f"bf16-{stage}", made, stage=stage, ranks=2)
    runs.share("bf16-plain", made, stage=2, ranks=1, size=1)
    both = {"sequence_parallel_size": 2}
    runs.share("llama-both-3", runs.sft(**both), stage=3, ranks=4)
    runs.share("dpo-both-2", runs.dpo(**both), stage=2, ranks=4)
    for stage in (1, 2, 3):
        made = runs.sft(checkpoint=SAVED[:1])
        on = {"output_dir": str(runs.folder / f"moving-{stage}"), "resume": "latest"}
        runs.share(f"moving-{stage}", {**made, "exit_iteration": 7}, stage=stage, ranks=2)
        runs.share(
            f"m2-{stage}", {**made, "exit_iteration": 13}, stage=stage, ranks=2, size=1, **on
        )
        runs.share(f"m3-{stage}", made, stage=stage, ranks=2, **on)
    runs.launch()
    return runs


@pytest.mark.full
@pytest.mark.parametrize(("name", "stage"), PAIRS)
def test_at_every_stage_and_of_every_kind(more_runs: Divided, name: str, stage: int) -> None:
    more_runs.same(f"{name}-{stage}", f"{name}-one", steps=_steps(name))


@pytest.mark.full
@pytest.mark.parametrize(("kind", "stage"), FOUR)
def test_four_ranks_are_two_groups_that_share_layers(
    more_runs: Divided, kind: str, stage: int
) -> None:
    more_runs.same(f"{kind}-four-{stage}", f"{kind}-one")


@pytest.mark.full
@pytest.mark.parametrize("stage", [2, 3])
def test_in_bf16_to_its_rounding(more_runs: Divided, stage: int) -> None:
    ours, theirs = (
        train_lines(more_runs.folder / name) for name in (f"bf16-{stage}", "bf16-plain")
    )
    assert len(ours) == len(theirs) == VARIANT_STEPS
    for line, other in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(other[key], rel=1e-2), (line["step"], key)


@pytest.mark.full
@pytest.mark.parametrize("run", ["llama-both-3", "dpo-both-2"])
def test_four_ranks_share_layers_and_rows(more_runs: Divided, run: str) -> None:
    """Two by two: every rank has half of the heads, and half of each row."""
    more_runs.same(run, f"{run.split('-')[0]}-one")


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_goes_on_where_ranks_share_no_layers_and_back(more_runs: Divided, stage: int) -> None:
    """7 steps shared, 6 on two ranks that are whole, 7 shared."""
    more_runs.same(f"moving-{stage}", "llama-one")


@pytest.mark.full
def test_a_run_goes_on_with_fewer_groups_and_then_whole(tmp_path: Path) -> None:
    """3 steps on four ranks as two groups, 2 on one group, 3 on one rank."""
    runs = Divided(tmp_path)
    made = runs.sft(model__config=QWEN3, checkpoint=SAVED[:1], train_iters=8, eval_interval=3)
    runs.share("plain", made, stage=0, ranks=1, size=1)
    for ranks, size, end in ((4, 2, 3), (2, 2, 5), (1, 1, 8)):
        for stage in (2, 3):
            runs.share(
                f"on-{stage}-{ranks}", {**made, "exit_iteration": end}, stage=stage, ranks=ranks,
                size=size, output_dir=str(tmp_path / f"on-{stage}"),
                resume="" if ranks == 4 else "latest",
            )  # fmt: skip
        runs.launch()
    for stage in (2, 3):
        runs.same(f"on-{stage}", "plain", steps=8)


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 3])
def test_checkpoints_of_other_stages_are_read_whole(more_runs: Divided, stage: int) -> None:
    import torch

    from arctic_like.checkpoint.reading import read_any

    found = read_any(more_runs.folder / f"llama-{stage}")
    for name, weight in more_runs.weights(f"llama-{stage}").items():
        assert torch.equal(found[name], weight), name
