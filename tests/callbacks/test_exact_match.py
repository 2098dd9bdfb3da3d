"""exact_match against a greedy loop without batches, padding or cache."""

from __future__ import annotations

import contextlib
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from arctic_like.callbacks import exact_match
from arctic_like.callbacks.exact_match import ExactMatch, ExactMatchConfig
from arctic_like.errors import RecipeError
from arctic_like.generation import (
    generate_batch,
    generation_config,
    prompt_ids,
    shares,
    stop_tokens,
)
from arctic_like.tokenizer.byte import byte_tokenizer
from arctic_like.world import World

TOKENIZER = byte_tokenizer()
SHAPE = {"vocab_size": 262, "bos_token_id": None, "eos_token_id": 257, "pad_token_id": 256}


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SHAPE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Learned absolute positions: wrong ones under left padding would show at once."""
    torch.manual_seed(seed)
    config = GPT2Config(
        **SHAPE, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.4
    )
    return GPT2LMHeadModel(config).eval()


def conversation(question: str, answer: str, **columns):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **columns}


QUESTIONS = [
    "a", "What is it?", "ünï", "a longer question, by which others are padded", "", "b" * 70, "hm",
]  # fmt: skip


def one_at_a_time(model, questions, max_new_tokens: int) -> list[str]:
    """The reference: no batch, no padding, no mask; argmax over the whole sequence each time."""
    answers = []
    for question in questions:
        ids = [259, *question.encode(), 257, 260]
        start = len(ids)
        for _ in range(max_new_tokens):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == 257:
                break
        new = bytes(token for token in ids[start:] if token < 256)
        answers.append(new.decode(errors="replace").strip())
    return answers


class FakeTrainer:
    """What the callback asks of a trainer, for one rank of a world."""

    def __init__(self, model, *, rank: int = 0, size: int = 1, zero_stage: int = 0) -> None:
        self.module, self.tokenizer, self.device = model, TOKENIZER, "cpu"
        self.world = World(rank=rank, size=size)
        self.zero_stage = zero_stage
        self.shared: list[list[float]] = []

    def sum_over_ranks(self, values):
        self.shared.append(list(values))
        return list(values)

    def preserve_random_state(self):
        return contextlib.nullcontext()


@pytest.fixture
def callback(tmp_path):
    """Makes the callback over given rows."""

    def make(rows, *, source=None, **config) -> ExactMatch:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        place = {"type": "file", "name_or_path": str(path), **(source or {})}
        return ExactMatch(ExactMatchConfig(source=place, **config))

    return make


def evaluate(callback: ExactMatch, trainer: FakeTrainer) -> dict[str, float]:
    results: dict[str, float] = {}
    callback.on_evaluate_end(trainer, results)
    return results


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batched_answers_are_those_of_one_prompt_at_a_time(make_model, batch_size):
    model = make_model()
    expected = one_at_a_time(model, QUESTIONS, 12)
    assert len(set(expected)) > 3  # a model that says the same to all would prove nothing
    config = generation_config(stop=[257], pad=256, max_new_tokens=12)
    prompts = [prompt_ids(TOKENIZER, [{"role": "user", "content": q}]) for q in QUESTIONS]
    answers = {}
    for batch in shares([len(p) for p in prompts], batch_size=batch_size, rank=0, size=1):
        out = generate_batch(model, [prompts[i] for i in batch], config=config, device="cpu")
        answers.update(zip(batch, out, strict=True))
    texts = [TOKENIZER.decode(answers[i], skip_special_tokens=True).strip() for i in range(7)]
    assert texts == expected


def test_counts_exactly_the_right_answers(callback):
    model = tiny_llama()
    said = one_at_a_time(model, QUESTIONS, 12)
    rows = [conversation(q, f"  {a}\n", kind="right") for q, a in zip(QUESTIONS, said, strict=True)]
    rows += [conversation(q, a + "x", kind="wrong") for q, a in zip(QUESTIONS, said, strict=True)]
    results = evaluate(callback(rows, max_new_tokens=12), FakeTrainer(model))
    assert results == {
        "eval/exact_match": 0.5,
        "eval/exact_match/right": 1.0,
        "eval/exact_match/wrong": 0.0,
    }


@pytest.mark.parametrize("limit", [None, 4])
def test_the_whole_is_weighted_by_prompts_and_not_by_groups(callback, limit):
    model = tiny_llama()
    said = one_at_a_time(model, QUESTIONS, 8)
    groups = ["x", "y", "y", "y", "y", "y", "y"]
    good = [True, True, False, False, True, False, False]
    rows = [
        conversation(q, a if g else "no", task=t)
        for q, a, g, t in zip(QUESTIONS, said, good, groups, strict=True)
    ]
    trainer = FakeTrainer(model)
    results = evaluate(
        callback(rows, group_by="task", max_new_tokens=8, limit=limit, metric="em"), trainer
    )
    whole, second = (3 / 7, 2 / 6) if limit is None else (2 / 4, 1 / 3)
    assert results == pytest.approx({"eval/em": whole, "eval/em/x": 1.0, "eval/em/y": second})


def test_only_the_last_answer_is_asked_for_and_history_is_given(callback):
    history = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
    ]
    row = {"messages": [*history, {"role": "assistant", "content": " a2 "}]}
    (task,) = exact_match.read_tasks(callback([row]).config, TOKENIZER)
    text = "<|system|>s<|end|><|user|>q1<|end|><|assistant|>a1<|end|><|user|>q2<|end|><|assistant|>"
    assert TOKENIZER.decode(task.prompt) == text
    assert (task.answer, task.group) == ("a2", "")


def test_rows_are_read_as_the_data_section_reads_them(callback):
    rows = [{"ask": f"q{i}", "say": f"a{i}"} for i in range(5)]
    mapped = {"role_mapping": {"user": "ask", "assistant": "say"}}
    tasks = exact_match.read_tasks(callback(rows, source=mapped).config, TOKENIZER)
    assert [task.answer for task in tasks] == [f"a{i}" for i in range(5)]
    assert [bytes(task.prompt[1:3]).decode() for task in tasks] == [f"q{i}" for i in range(5)]
    drawn = callback(rows, source={**mapped, "sample_count": 2}).config
    assert len(exact_match.read_tasks(drawn, TOKENIZER)) == 2
    pair = callback([{"prompt": "q", "completion": "a"}]).config
    assert [task.answer for task in exact_match.read_tasks(pair, TOKENIZER)] == ["a"]


@given(
    lengths=st.lists(st.integers(1, 9), max_size=40),
    batch_size=st.integers(1, 7),
    size=st.integers(1, 6),
)
def test_ranks_share_all_prompts_once_and_in_step(lengths, batch_size, size):
    each = [list(shares(lengths, batch_size=batch_size, rank=r, size=size)) for r in range(size)]
    assert sorted(i for rank in each for batch in rank for i in batch) == list(range(len(lengths)))
    assert len({len(rank) for rank in each}) == 1
    assert all(len(batch) <= batch_size for rank in each for batch in rank)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_ranks_counts_add_up_to_those_of_one(callback, zero_stage, monkeypatch):
    model = tiny_llama()
    said = one_at_a_time(model, QUESTIONS, 8)
    rows = [
        conversation(q, a if i % 2 else "no", kind=str(i % 3))
        for i, (q, a) in enumerate(zip(QUESTIONS, said, strict=True))
    ]
    calls: list[bool] = []

    def spy(model, prompts, *, synced, **kwargs):
        calls.append(synced)
        return generate_batch(model, prompts, synced=False, **kwargs)

    monkeypatch.setattr(exact_match, "generate_batch", spy)
    trainers = [FakeTrainer(model, rank=r, size=5, zero_stage=zero_stage) for r in range(5)]
    per_rank = []
    for trainer in trainers:
        calls.clear()
        evaluate(callback(rows, max_new_tokens=8, batch_size=1), trainer)
        per_rank.append(len(calls))
        assert set(calls) <= {zero_stage == 3}
    # 7 prompts, 5 ranks: under ZeRO-3 all of them call the model equally often.
    assert per_rank == ([2, 2, 2, 2, 2] if zero_stage == 3 else [2, 2, 1, 1, 1])
    together = np.sum([trainer.shared[0] for trainer in trainers], axis=0)
    alone = FakeTrainer(model)
    evaluate(callback(rows, max_new_tokens=8), alone)
    assert together.tolist() == alone.shared[0]


def test_mode_and_random_generators_are_left_alone(callback):
    from arctic_like.engine.random_state import preserved

    trainer = FakeTrainer(tiny_llama())
    trainer.preserve_random_state = preserved
    trainer.module.train()
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    evaluate(callback([conversation("q", "a")]), trainer)
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    assert trainer.module.training
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_the_models_own_generation_config_changes_nothing(callback):
    model = tiny_llama()
    said = one_at_a_time(model, QUESTIONS, 12)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, top_p=0.5, repetition_penalty=3.0, num_beams=3,
        max_new_tokens=1, eos_token_id=2,
    )  # fmt: skip
    model.config.use_cache = False
    rows = [conversation(q, a) for q, a in zip(QUESTIONS, said, strict=True)]
    assert evaluate(callback(rows, max_new_tokens=12), FakeTrainer(model)) == {
        "eval/exact_match": 1.0
    }


def test_what_ends_an_answer():
    model = tiny_llama()
    assert stop_tokens(TOKENIZER, model) == [257]
    model.generation_config.eos_token_id = [2, 256]  # 2 is a byte here, 256 is special
    assert stop_tokens(TOKENIZER, model) == [256, 257]
    other = byte_tokenizer()
    other.eos_token = "<|pad|>"  # as where documents end otherwise than turns
    model.generation_config.eos_token_id = None
    assert stop_tokens(other, model) == [256, 257]


def test_summary_goes_from_the_first_to_the_last_values_over_a_resume(callback):
    model = tiny_llama()
    said = one_at_a_time(model, ["q", "r"], 8)
    rows = [conversation("q", said[0], kind="k"), conversation("r", "no", kind="l")]
    first = callback(rows, max_new_tokens=8)
    assert first.summary() == []
    evaluate(first, FakeTrainer(model))
    state = json.loads(json.dumps(first.state_dict()))
    better = [conversation("q", said[0], kind="k"), conversation("r", said[1], kind="l")]
    resumed = callback(better, max_new_tokens=8)
    resumed.load_state_dict(state)
    assert resumed.summary() == first.summary()
    evaluate(resumed, FakeTrainer(model))
    assert resumed.summary() == [
        ("exact_match", 0.5, 1.0), ("exact_match/k", 1.0, 1.0), ("exact_match/l", 0.0, 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "config", "expected"),
    [
        ([], {}, "holds no rows"),
        (
            [{"text": "x"}],
            {},
            "has a `text`, which is no conversation; expected is `messages`.*rows.jsonl:1",
        ),
        ([{"messages": [{"role": "user", "content": "q"}]}], {}, "without a question and its"),
        ([conversation("q", "a")], {"group_by": "kind"}, "without the column 'kind'"),
        ([conversation("q" * 300, "a")], {}, "more than the model's 256 positions"),
    ],
)
def test_sentences(callback, rows, config, expected):
    with pytest.raises(RecipeError, match=expected):
        callback(rows, **config).on_setup_end(FakeTrainer(tiny_llama()))


def test_a_model_that_cannot_generate_is_refused(callback):
    with pytest.raises(RecipeError, match="needs a model that generates"):
        callback([conversation("q", "a")]).on_setup_end(FakeTrainer(torch.nn.Linear(1, 1)))
