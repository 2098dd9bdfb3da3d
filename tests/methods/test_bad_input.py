"""What cannot be trained is said in one message, with its place and a way out, before a step is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arctic_like import load_recipe, run
from arctic_like.errors import RecipeError
from tests.integration.tools import MODEL, write_conversations, write_recipe
from tests.methods.runs import answers, kto, pairs, reward, whole, write_rows
from tests.methods.test_distillation import distill
from tests.model.shapes import GPT2, byte_tokenizer, make

LORA = {"type": "lora", "r": 2, "target_modules": ["q_proj"]}
OTHER = {"config": {**MODEL, "vocab_size": 512}, "dtype": "fp32"}
OWN = {"config": {**MODEL, "vocab_size": 300}, "dtype": "fp32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for prefix in ("", "eval-"):
        write_rows(folder / f"{prefix}pairs.jsonl", pairs(6, seed=0))
        write_rows(folder / f"{prefix}answers.jsonl", answers(6, seed=0))
        write_conversations(folder / f"{prefix}talk.jsonl", count=6)
    equal = pairs(6, seed=0)
    equal[3]["rejected"] = equal[3]["chosen"]
    write_rows(folder / "equal.jsonl", equal)
    wanted = [{**row, "label": True} for row in answers(6, seed=0)]
    write_rows(folder / "wanted.jsonl", wanted)
    for name, rows in (("equal", "pairs"), ("wanted", "answers")):
        (folder / f"eval-{name}.jsonl").write_bytes((folder / f"{rows}.jsonl").read_bytes())
    make(MODEL, seed=1).save_pretrained(folder / "llama")
    make(GPT2, seed=1).save_pretrained(folder / "gpt2")
    made = make(name_or_path=str(folder / "gpt2"), peft_config={**LORA, "target_modules": ["c_fc"]})
    made.save_pretrained(folder / "adapter")
    for name in ("llama", "gpt2", "adapter"):
        byte_tokenizer().save_pretrained(folder / name)
    return folder


def dpo(data: Path, **changes: Any) -> dict[str, Any]:
    return whole(data, **{"type": "dpo", "data__type": "dpo", **changes})


def under(folder: Path, **model: Any) -> dict[str, Any]:
    return {"name_or_path": str(folder / "llama"), "dtype": "fp32", **model}


CASES: dict[str, tuple[Any, str, list[str]]] = {
    "dpo, another vocabulary": (
        lambda d: dpo(d / "pairs.jsonl", model=OWN, ref_model=OTHER),
        "reference.model", ["has 512 tokens, the policy 300"],
    ),
    "dpo, another vocabulary, computed in advance": (
        lambda d: dpo(d / "pairs.jsonl", model=OWN, ref_model=OTHER, precompute_reference=True),
        "reference.model", ["has 512 tokens, the policy 300"],
    ),
    "kto, another vocabulary": (
        lambda d: kto(whole, d / "answers.jsonl", model=OWN, ref_model=OTHER),
        "reference.model", ["has 512 tokens, the policy 300"],
    ),
    "distill, another vocabulary": (
        lambda d: distill(d / "talk.jsonl", model=OWN, teacher={"model": OTHER, "frozen": True}),
        "teacher.model", ["512", "300"],
    ),
    "a policy whose vocabulary is its tokenizer's": (
        lambda d: dpo(d / "pairs.jsonl", ref_model=OTHER, precompute_reference=True),
        "reference.model", ["has 512 tokens, the policy 262"],
    ),
    "distill, a student whose vocabulary is its tokenizer's": (
        lambda d: distill(
            d / "talk.jsonl", teacher={"model": OTHER, "frozen": True}, teacher_cache={}
        ),
        "teacher.model", ["512", "262"],
    ),
    "dpo, equal answers": (
        lambda d: dpo(d / "equal.jsonl"), "",
        ["equal.jsonl:4", "same text as its chosen and its rejected answer"],
    ),
    "reward, equal answers": (
        lambda d: reward(whole, d / "equal.jsonl"), "", ["equal.jsonl:4", "same text"],
    ),
    "kto, one label": (
        lambda d: kto(whole, d / "wanted.jsonl"), "data.sources", ["6 answers that are all wanted"],
    ),
    "an adapter for another architecture": (
        lambda d: whole(d / "talk.jsonl", model=under(d, adapter=str(d / "adapter"))),
        "model.adapter", ["another architecture", "this llama has no c_fc"],
    ),
    "targets that match nothing": (
        lambda d: whole(d / "talk.jsonl", model=under(
            d, peft_config={**LORA, "target_modules": ["q_proj", "query"]})),
        "model.peft_config.target_modules", ["'query'", "q_proj"],
    ),
    "a pattern that matches nothing": (
        lambda d: whole(d / "talk.jsonl", model=under(
            d, peft_config={**LORA, "target_modules": r".*\.attention\..*"})),
        "model.peft_config.target_modules", ["is the pattern"],
    ),
    "a head that is to be saved and is not there": (
        lambda d: whole(d / "talk.jsonl", model=under(
            d, peft_config={**LORA, "modules_to_save": ["score"]})),
        "model.peft_config.modules_to_save", ["'score'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_message_says_what_is_wrong_and_what_to_do(
    data: Path, tmp_path: Path, case: str
) -> None:
    made, place, said = CASES[case]
    path = write_recipe(
        tmp_path / "recipe.yaml", {**made(data), "output_dir": str(tmp_path / "run")}
    )
    with pytest.raises(RecipeError) as caught:
        run(load_recipe(path))
    (problem,) = caught.value.problems
    assert problem.place == place  # of a row, the message has file and line
    assert problem.hint
    for words in said:
        assert words in str(caught.value)
