"""Adapters on models that score, classify or embed: their heads go along, and plain peft reads them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from pydantic import ValidationError

from arctic_like import load_recipe
from arctic_like import run as arctic_run
from arctic_like.checkpoint.huggingface import export
from arctic_like.cli import chat
from arctic_like.cli.merge import command
from arctic_like.engine.host import HostGroup
from arctic_like.errors import RecipeError, RunError
from arctic_like.inference import load_for_inference
from arctic_like.model.adapters.tasks import task_of
from arctic_like.registry import lookup
from arctic_like.world import World
from tests.integration.tools import write_conversations, write_recipe
from tests.methods.runs import pairs, reward, series, whole, write_rows
from tests.model.shapes import LLAMA, byte_tokenizer, make

IDS = (torch.arange(48).view(4, 12) * 37 + 5) % 256
LORA = {"type": "lora", "r": 4, "target_modules": "all-linear"}
BERT = {
    "model_type": "bert", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 262,
}  # fmt: skip
# name → base, `model:` of the recipe, transformers' class, peft's task, modules that are trained whole
KINDS: dict[str, tuple[str, dict[str, Any], str, str, list[str]]] = {
    "scoring": ("llama", {"type": "scoring"}, "SequenceClassification", "SEQ_CLS", ["score"]),
    "steps": ("llama", {"type": "token_scoring"}, "TokenClassification", "TOKEN_CLS", ["score"]),
    "labels": ("bert", {"type": "classifier", "labels": ["a", "b", "c"]}, "SequenceClassification",
               "SEQ_CLS", ["bert.pooler.dense", "classifier"]),
    "words": ("bert", {"type": "classifier", "task": "token", "labels": ["a", "b", "c"]},
              "TokenClassification", "TOKEN_CLS", ["classifier"]),
    "embedding": ("llama", {"type": "embedding"}, "", "FEATURE_EXTRACTION", []),
    "encoder": ("bert", {"type": "embedding"}, "", "FEATURE_EXTRACTION", []),
}  # fmt: skip
ADAPTERS = {
    "lora": LORA,
    "dora": {**LORA, "use_dora": True, "use_rslora": True},
    "ia3": {"type": "ia3", "target_modules": ["q_proj", "down_proj"],
            "feedforward_modules": ["down_proj"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A causal language model and a masked one: neither brings a head, the latter no pooler."""
    root = tmp_path_factory.mktemp("bases")
    make(LLAMA, seed=11).save_pretrained(root / "llama")
    torch.manual_seed(3)
    shape = transformers.AutoConfig.for_model(**BERT)
    transformers.AutoModelForMaskedLM.from_config(shape).save_pretrained(root / "bert")
    for name in ("llama", "bert"):
        byte_tokenizer().save_pretrained(root / name)
    return {name: root / name for name in ("llama", "bert")}


def built(kind: str, base: Path | None = None, *, tokenizer: Any = None, **more: Any) -> Any:
    """The model of a recipe, as it is trained."""
    model = {"dtype": "fp32", **KINDS[kind][1], **more}
    if base is not None:
        model["name_or_path"] = str(base)
    part: Any = lookup("model", model["type"])
    return part(part.config_type.model_validate(model)).build(
        tokenizer=tokenizer or byte_tokenizer(), seed=3, world=World(), device="cpu", zero_stage=0,
        ds_config={},
    )  # fmt: skip


def plain(kind: str, base: Path) -> Any:
    """The base with a head, by transformers alone."""
    of_class, labels = KINDS[kind][2], KINDS[kind][1].get("labels")
    auto = getattr(transformers, f"AutoModelFor{of_class}" if of_class else "AutoModel")
    more = {} if not of_class else {"num_labels": len(labels) if labels else (kind == "steps") + 1}
    return auto.from_pretrained(base, dtype=torch.float32, **more)


def outputs(model: Any) -> torch.Tensor:
    """What a model answers, row by row."""
    with torch.no_grad():
        found = [model.eval()(input_ids=row[None]) for row in IDS]
    hidden = [one.logits if hasattr(one, "logits") else one.last_hidden_state for one in found]
    return torch.cat(hidden)


def moved(model: Any) -> Any:
    """The same with every trained weight changed."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_head_and_adapter_are_trained_and_nothing_else(bases: dict[str, Path], kind: str) -> None:
    base, _, _, task, whole = KINDS[kind]
    model = built(kind, bases[base], peft_config=LORA)
    assert model.peft_config["default"].task_type == task
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    heads = {name for name in trained if ".modules_to_save.default." in name}
    assert {name.partition(".modules_to_save")[0] for name in heads} == {
        f"base_model.model.{name}" for name in whole
    }
    assert trained - heads
    assert all(".lora_A." in name or ".lora_B." in name for name in trained - heads)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_read_by_plain_peft_and_merged(
    bases: dict[str, Path], tmp_path: Path, kind: str, adapter: str
) -> None:
    """Over transformers' own model of the base, whose random head does not matter; so is what we load
    ourselves, and what `merge` writes."""
    base, _, of_class, task, whole = KINDS[kind]
    config = ADAPTERS[adapter]
    if adapter == "ia3" and base == "bert":
        config = {"type": "ia3"}
    model = moved(built(kind, bases[base], peft_config=config))
    export(model, byte_tokenizer(), directory=tmp_path / "out", host=HostGroup(World()))
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (said["task_type"], sorted(said["modules_to_save"] or [])) == (task, whole)
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        other = peft.PeftModel.from_pretrained(plain(kind, bases[base]), tmp_path / "out")
    expected = outputs(other)
    ours, _ = load_for_inference(tmp_path / "out")
    torch.testing.assert_close(outputs(ours), expected, rtol=0, atol=2e-6)
    # the way that sentence-transformers takes; transformers 5.23 misreads a DoRA that peft wrote, too
    if not of_class and adapter != "dora":
        found = outputs(transformers.AutoModel.from_pretrained(tmp_path / "out"))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    if of_class == "SequenceClassification":  # trained for scores of every token, or pooled
        found = outputs(model)
        found = found[:, -1] if kind == "scoring" else found
    else:
        found = outputs(model)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    done = CliRunner().invoke(command, [str(tmp_path / "out"), str(tmp_path / "merged")])
    assert done.exit_code == 0, done.exception
    merged, _ = load_for_inference(tmp_path / "merged")
    assert type(merged) is type(plain(kind, bases[base]))
    assert (outputs(merged) - expected).abs().max() <= 1e-5 * expected.abs().max()
    if "labels" in KINDS[kind][1]:
        assert merged.config.id2label == ours.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_training_goes_on_from_an_adapter_of_ours_or_of_peft(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    for kind, base in (("scoring", "llama"), ("labels", "bert"), ("embedding", "llama")):
        model = moved(built(kind, bases[base], peft_config=LORA))
        export(model, byte_tokenizer(), directory=tmp_path / kind / "ours", host=HostGroup(World()))
        model.save_pretrained(tmp_path / kind / "peft")
        expected = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for source in ("ours", "peft"):
            again = built(kind, bases[base], adapter=str(tmp_path / kind / source))
            found = {n: p for n, p in again.named_parameters() if p.requires_grad}
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], one) for name, one in expected.items()), kind


def test_an_adapter_of_a_language_model_is_refused_with_the_way_out(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    model = make(name_or_path=str(bases["llama"]), peft_config=LORA)
    export(model, byte_tokenizer(), directory=tmp_path / "sft", host=HostGroup(World()))
    for kind, task in (("scoring", "SEQ_CLS"), ("embedding", "FEATURE_EXTRACTION")):
        with pytest.raises(RecipeError, match=f"for CAUSAL_LM, .* {task}") as caught:
            built(kind, bases["llama"], adapter=str(tmp_path / "sft"))
        assert "arctic-train merge" in str(caught.value)
    scoring = built("scoring", bases["llama"], peft_config=LORA)
    export(scoring, byte_tokenizer(), directory=tmp_path / "reward", host=HostGroup(World()))
    with pytest.raises(RecipeError, match=r"for SEQ_CLS, .* CAUSAL_LM"):
        make(name_or_path=str(bases["llama"]), adapter=str(tmp_path / "reward"))


def test_another_base_is_refused_and_another_random_head_is_not(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    model = built("scoring", bases["llama"], peft_config=LORA)
    export(model, byte_tokenizer(), directory=tmp_path / "adapter", host=HostGroup(World()))
    make(LLAMA, seed=12).save_pretrained(tmp_path / "other")
    words = [str(tmp_path / "adapter"), "--into", str(tmp_path / "other"), str(tmp_path / "out")]
    assert "another base" in str(CliRunner().invoke(command, words).exception)
    torch.manual_seed(99)  # transformers draws the head that is replaced
    load_for_inference(tmp_path / "adapter")


def test_the_head_begins_as_it_does_without_an_adapter(bases: dict[str, Path]) -> None:
    for kind, base, head in (("scoring", "llama", "score"), ("labels", "bert", "classifier")):
        whole = built(kind, bases[base])
        under = built(kind, bases[base], peft_config=LORA).get_base_model()
        trained = getattr(under, head).modules_to_save["default"]
        assert torch.equal(trained.weight, getattr(whole, head).weight)
        assert torch.equal(outputs(built(kind, bases[base], peft_config=LORA)), outputs(whole))


def test_a_head_that_the_base_has_is_trained_on(bases: dict[str, Path], tmp_path: Path) -> None:
    scorer = moved(built("scoring", bases["llama"]))
    export(scorer, byte_tokenizer(), directory=tmp_path / "scorer", host=HostGroup(World()))
    model = built("scoring", tmp_path / "scorer", peft_config=LORA)
    assert torch.equal(model.get_base_model().score.weight, scorer.score.weight)
    torch.testing.assert_close(outputs(model), outputs(scorer), rtol=0, atol=1e-6)
    export(moved(model), byte_tokenizer(), directory=tmp_path / "out", host=HostGroup(World()))
    loaded, _ = load_for_inference(tmp_path / "out")
    torch.testing.assert_close(outputs(loaded), outputs(model)[:, -1], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_config": {"type": "prompt_tuning", "num_virtual_tokens": 3}}, "virtual tokens"),
        ({"peft_config": {**LORA, "task_type": "CAUSAL_LM"}}, "task_type"),
        ({"peft_config": LORA, "quantization": "4bit"}, "quantization"),
        ({"quantization": "4bit"}, "quantization"),
    ],
)
@pytest.mark.parametrize("kind", ["scoring", "labels", "embedding"])
def test_what_a_head_cannot_have_is_found_by_validation(
    kind: str, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError) as raised:
        built(kind, Path("/some/where"), **change)
    context = raised.value.errors()[0]["ctx"]
    assert said in f"{context['place']}: {context['message']}"


def test_targets_that_match_nothing_are_named(bases: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match="names 'qkv'") as caught:
        built("scoring", bases["llama"], peft_config={**LORA, "target_modules": ["qkv"]})
    assert "q_proj" in str(caught.value)


def test_a_checkpoint_of_a_run_is_its_export(bases: dict[str, Path], tmp_path: Path) -> None:
    """Loaded through the recipe, which says what kind of model it is; and merged from the run."""
    data = write_rows(tmp_path / "pairs.jsonl", pairs(6, seed=0))
    write_rows(tmp_path / "eval-pairs.jsonl", pairs(2, seed=1))
    own = {
        "type": "scoring", "name_or_path": str(bases["llama"]), "dtype": "fp32", "peft_config": LORA,
    }  # fmt: skip
    kinds = [{"type": kind, "save_end_of_training": True} for kind in ("deepspeed", "huggingface")]
    made = reward(
        whole, data, model=own, train_iters=2, output_dir=str(tmp_path / "run"), checkpoint=kinds
    )
    arctic_run(load_recipe(write_recipe(tmp_path / "recipe.yaml", made)))
    kept, _ = load_for_inference(tmp_path / "run" / "checkpoints" / "step-2")
    exported, _ = load_for_inference(tmp_path / "run" / "exports" / "step-2")
    torch.testing.assert_close(outputs(kept), outputs(exported), rtol=0, atol=1e-6)
    assert (outputs(kept) - outputs(built("scoring", bases["llama"]))[:, -1]).abs().max() > 1e-4
    done = CliRunner().invoke(command, [str(tmp_path / "run"), str(tmp_path / "merged")])
    assert done.exit_code == 0, done.exception
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(merged), outputs(kept), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["scoring", "labels", "embedding"])
def test_rows_of_added_tokens_go_along(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|think|>"])
    rows = "embed_tokens" if KINDS[kind][0] == "llama" else "word_embeddings"
    config = {**LORA, "modules_to_save": [rows]}
    model = moved(built(kind, bases[KINDS[kind][0]], tokenizer=tokenizer, peft_config=config))
    export(model, tokenizer, directory=tmp_path / "out", host=HostGroup(World()))
    ours, its = load_for_inference(tmp_path / "out")
    assert ours.get_input_embeddings().weight.shape[0] == len(its) == 263
    new = torch.tensor([[5, 262, 7]])
    with torch.no_grad():
        found, expected = (one.eval()(input_ids=new)[0] for one in (ours, model))
    expected = expected[:, -1] if kind == "scoring" else expected
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    done = CliRunner().invoke(command, [str(tmp_path / "out"), str(tmp_path / "merged")])
    assert done.exit_code == 0, done.exception
    merged, _ = load_for_inference(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=new)[0], found, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        LORA,
        {**LORA, "use_dora": True},
        {"type": "ia3"},
        {"type": "oft", "oft_block_size": 4, "target_modules": ["q_proj"]},
        {**LORA, "modules_to_save": ["lm_head"]},
        {**LORA, "modules_to_save": ["embed_tokens", "norm"]},
        {**LORA, "target_modules": ["q_proj", "embed_tokens"]},
        {**LORA, "trainable_token_indices": [3, 5]},
    ],
    ids=["lora", "dora", "ia3", "oft", "head", "body", "embeddings", "tokens"],
)
def test_in_fp32_over_a_base_in_bf16_it_answers_as_in_fp32(
    bases: dict[str, Path], config: dict[str, Any]
) -> None:
    """To bf16's rounding; and every weight that is trained has a gradient in fp32."""
    mixed, wide = (
        moved(make(name_or_path=str(bases["llama"]), seed=3, peft_config=config, **more))
        for more in ({"dtype": "bf16", "adapter_dtype": "fp32"}, {})
    )
    answers_alike(mixed, wide)


@pytest.mark.parametrize("kind", KINDS)
def test_so_does_one_with_a_head(bases: dict[str, Path], kind: str) -> None:
    base = bases[KINDS[kind][0]]
    low = {"dtype": "bf16", "adapter_dtype": "fp32"}
    mixed, wide = (moved(built(kind, base, peft_config=LORA, **more)) for more in (low, {}))
    answers_alike(mixed, wide)


def test_a_run_in_fp32_over_a_base_in_bf16_has_nearly_the_losses_of_fp32(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """Also where the head, whose loss is computed without full logits, is trained whole."""
    data = write_conversations(tmp_path / "talk.jsonl", count=6)
    write_conversations(tmp_path / "eval-talk.jsonl", count=2)
    losses = []
    for number, more in enumerate(({"dtype": "bf16", "adapter_dtype": "fp32"}, {"dtype": "fp32"})):
        own = {
            "name_or_path": str(bases["llama"]), **more,
            "peft_config": {**LORA, "modules_to_save": ["lm_head"]},
        }  # fmt: skip
        made = whole(data, model=own, output_dir=str(tmp_path / f"{number}"))
        made["optimizer"]["learning_rate"] = 3e-2
        arctic_run(load_recipe(write_recipe(tmp_path / f"{number}.yaml", made)))
        losses.append(series(tmp_path / f"{number}", "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[1][-1] < 0.98 * losses[1][0]


def answers_alike(mixed: Any, wide: Any) -> None:
    expected, found = outputs(wide), outputs(mixed).float()
    assert (found - expected).abs().max() <= 0.03 * expected.abs().max()
    output = mixed.train()(input_ids=IDS[:1])
    hidden = output.logits if hasattr(output, "logits") else output.last_hidden_state
    hidden.float().square().sum().backward()
    for name, parameter in mixed.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
        if parameter.requires_grad:
            assert parameter.grad is not None, name


def test_a_model_without_text_is_not_talked_to(bases: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("scoring", "embedding"):
        for config in (LORA, None):
            model = built(kind, bases["llama"], peft_config=config)
            folder = tmp_path / f"{kind}-{config is None}"
            export(model, byte_tokenizer(), directory=folder, host=HostGroup(World()))
            with pytest.raises(RecipeError, match="writes no text"):
                chat.load(folder, device="cpu")


def test_tasks_are_known_by_architectures() -> None:
    known = {
        "LlamaForSequenceClassification": "SEQ_CLS", "BertForTokenClassification": "TOKEN_CLS",
        "LlamaModel": "FEATURE_EXTRACTION", "GPT2LMHeadModel": "CAUSAL_LM",
        "Qwen3ForCausalLM": "CAUSAL_LM",
    }  # fmt: skip
    assert {name: task_of([name]) for name in known} == known
    assert task_of(None) == "CAUSAL_LM"


def test_merging_says_where_the_result_answers_otherwise(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison is of scores, not of logits of tokens that there are none of."""
    model = moved(built("scoring", bases["llama"], peft_config=LORA))
    export(model, byte_tokenizer(), directory=tmp_path / "out", host=HostGroup(World()))
    unload = peft.tuners.lora.LoraModel.merge_and_unload

    def wrong(self: Any, **options: Any) -> Any:
        merged = unload(self, **options)
        with torch.no_grad():
            merged.score.weight.mul_(1.01)
        return merged

    monkeypatch.setattr(peft.tuners.lora.LoraModel, "merge_and_unload", wrong)
    done = CliRunner().invoke(command, [str(tmp_path / "out"), str(tmp_path / "merged")])
    assert isinstance(done.exception, RunError)
