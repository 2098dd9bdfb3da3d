"""`arctic-train generate`: answers against a greedy loop without a cache, rows, interruptions."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import LlamaConfig, LlamaForCausalLM

from arctic_like.cli import answering, generate
from arctic_like.cli.answers_file import AnswersFile
from arctic_like.cli.main import main
from arctic_like.errors import RecipeError
from arctic_like.tokenizer.byte import byte_tokenizer

END = 257
ROWS: list[dict[str, Any]] = [
    {"id": 1, "prompt": "Who?"},
    {"prompt": "a much longer question than the others, ünï", "tags": ["x", {"y": None}]},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}], "z": 1.5},
    {"prompt": "\u2028 odd"},
    {"prompt": [{"role": "user", "content": "turns"}]},
]
TEXTS = [
    "<|user|>Who?<|end|><|assistant|>",
    "<|user|>a much longer question than the others, ünï<|end|><|assistant|>",
    "<|system|>s<|end|><|user|>hi<|end|><|assistant|>",
    "<|user|>\u2028 odd<|end|><|assistant|>",
    "<|user|>turns<|end|><|assistant|>",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=262, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=96, initializer_range=0.4,
        bos_token_id=None, eos_token_id=END, pad_token_id=256,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("generate") / "model"
    LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path.write_text("\n".join([*lines[:2], "", *lines[2:]]))
    return path


def expected(folder: Path, text: str, most: int) -> str:
    """Greedy, one prompt, the whole sequence each time."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    ids = list(byte_tokenizer()(text)["input_ids"])
    new: list[int] = []
    while len(new) < min(most, 96 - len(ids)):
        with torch.no_grad():
            token = int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
        if token == END:
            break
        new.append(token)
    return bytes(token for token in new if token < 256).decode(errors="replace")


def run(*words: Any) -> Result:
    return CliRunner().invoke(generate.command, [str(word) for word in words])


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.full), 3])
def test_answers_are_those_of_one_prompt_alone(
    folder: Path, prompts: Path, tmp_path: Path, batch_size: int
) -> None:
    """The second prompt leaves less room than asked for: it stops where the positions end."""
    out = tmp_path / "deep" / "answers.jsonl"
    words = ("--input", prompts, "--output", out, "--max-new-tokens", 60)
    result = run(folder, *words, "--batch-size", batch_size)
    assert result.exit_code == 0, result.exception
    said = [expected(folder, text, 60) for text in TEXTS]
    assert len(set(said)) > 2
    room = 96 - len(byte_tokenizer()(TEXTS[1])["input_ids"])
    assert room < 60
    assert said[1] == expected(folder, TEXTS[1], room)  # nothing else ends it before
    assert answers(out) == [{**row, "answer": a} for row, a in zip(ROWS, said, strict=True)]
    assert [list(row) for row in answers(out)] == [[*row, "answer"] for row in ROWS]
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name]


def test_lines_of_text_and_raw_prompts(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one line\n\n{not json\n")
    for flags, shape in ((), "<|user|>{}<|end|><|assistant|>"), (("--raw",), "{}"):
        out = tmp_path / f"out{len(flags)}.jsonl"
        result = run(folder, "--input", tmp_path / "p.txt", "--output", out,
                     "--max-new-tokens", 6, "--answer-key", "said", *flags)  # fmt: skip
        assert result.exit_code == 0, result.exception
        assert answers(out) == [
            {"prompt": text, "said": expected(folder, shape.format(text), 6)}
            for text in ("one line", "{not json")
        ]


def test_draws_depend_on_seed_and_row_alone(folder: Path, prompts: Path, tmp_path: Path) -> None:
    def drawn(name: str, *words: Any) -> list[str]:
        result = run(folder, "--input", prompts, "--output", tmp_path / name, "--max-new-tokens", 12,
                     "--temperature", 1.5, "--top-p", 0.9, *words)  # fmt: skip
        assert result.exit_code == 0, result.exception
        return [row["answer"] for row in answers(tmp_path / name)]

    first = drawn("a", "--seed", 3, "--batch-size", 1)
    before = torch.random.get_rng_state()
    assert drawn("b", "--seed", 3, "--batch-size", 4) == first
    assert torch.equal(torch.random.get_rng_state(), before)
    assert drawn("c", "--seed", 4) != first


def test_draws_have_the_distribution_of_the_softmax() -> None:
    scores = torch.tensor([2.0, 0.0, 1.0, -math.inf])
    rows = 4_000
    draw = answering.Draws([(5, row) for row in range(rows)])
    found = Counter(draw(torch.empty(0), scores.expand(rows, 4)).argmax(-1).tolist())
    for token, share in enumerate(scores.softmax(0).tolist()):
        assert abs(found[token] / rows - share) < 4 * math.sqrt(0.25 / rows)
    assert found[3] == 0


def test_an_interrupted_command_goes_on_where_it_stopped(
    folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "answers.jsonl"
    words = [str(w) for w in ("generate", folder, "--input", prompts, "--output", out,
                              "--max-new-tokens", 9)]  # fmt: skip
    original, asked = answering.Generator.answer, []

    def interrupted(self: Any, prompts: dict[int, Any]) -> dict[int, str]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.extend(prompts)
        return original(self, prompts)

    monkeypatch.setattr(answering.Generator, "answer", interrupted)
    assert main([*words, "--batch-size", "2"]) == 130
    assert "2 of 5 answers" in capsys.readouterr().err
    journal = out.with_name("answers.jsonl.partial")
    assert not out.exists()
    with journal.open("a") as file:
        file.write('{"row": 4, "ans')  # what a kill leaves
    done: list[int] = []

    def watched(self: Any, prompts: dict[int, Any]) -> dict[int, str]:
        done.extend(prompts)
        return original(self, prompts)

    monkeypatch.setattr(answering.Generator, "answer", watched)
    assert main([*words, "--batch-size", "3"]) == 0
    assert sorted(done + asked) == [0, 1, 2, 3, 4]
    assert [row["answer"] for row in answers(out)] == [expected(folder, t, 9) for t in TEXTS]
    assert not journal.exists()
    assert main(words) == 2
    told = " ".join(capsys.readouterr().err.split())  # lines are cut to the terminal
    assert "is there already" in told
    monkeypatch.setattr(answering.Generator, "answer", original)
    assert main([*words, "--overwrite"]) == 0


def test_a_journal_may_be_cut_again_and_again(tmp_path: Path) -> None:
    for number in range(3):
        answers = AnswersFile(tmp_path / "out", about={"a": 1})
        answers.open()
        assert answers.answers == {row: f"ü{row}" for row in range(number)}
        answers.add({number: f"ü{number}"})
        answers.close()
        with answers.journal.open("a") as file:
            file.write('{"row": 7, "answer": "x')


def test_a_journal_of_another_command_is_left_alone(
    folder: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    journal = out.with_name("answers.jsonl.partial")
    journal.write_text(json.dumps({"about": {"raw": True}}) + "\n")
    result = run(folder, "--input", prompts, "--output", out)
    assert isinstance(result.exception, RecipeError)
    assert "another adapter, input, max_new_tokens, model, raw, sampling" in str(result.exception)
    assert journal.exists()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{oops", "is not JSON"),
        ("[1]", "is list, not an object"),
        ('{"text": "a"}', 'neither of the keys "prompt" and "messages"; it has text'),
        ('{"prompt": "a", "messages": []}', "both of the keys"),
        ('{"prompt": ""}', "an empty prompt"),
        ('{"prompt": "a", "answer": "b"}', "has the key 'answer' already"),
        ('{"messages": "hi"}', "no list of turns"),
        ('{"messages": [{"role": "user"}]}', "number 0"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "nothing left to answer"),
        (json.dumps({"prompt": "x" * 99}), "leaves no room to answer in the model's 96 positions"),
    ],
)
def test_bad_rows_are_named(folder: Path, tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    result = run(folder, "--input", path, "--output", tmp_path / "out.jsonl")
    assert isinstance(result.exception, RecipeError)
    (problem,) = result.exception.problems
    assert (problem.file, problem.line) == (str(path), 2)
    assert sentence in problem.message
    assert not (tmp_path / "out.jsonl").exists()


def test_many_bad_rows_are_counted(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("nothing\n" * 25)
    result = run(folder, "--input", tmp_path / "p.jsonl", "--output", tmp_path / "o")
    assert isinstance(result.exception, RecipeError)
    assert len(result.exception.problems) == 11
    assert "15 more" in str(result.exception)


def test_a_recipe_means_its_run(folder: Path, prompts: Path, tmp_path: Path) -> None:
    import shutil

    from tests.integration.tools import recipe, write_recipe

    content = recipe(prompts)
    path = write_recipe(tmp_path / "r.yaml", content)
    result = run(path, "--input", prompts, "--output", tmp_path / "o")
    assert "output_dir: is not stated" in str(result.exception)
    path = write_recipe(path, {**content, "output_dir": str(tmp_path / "run")})
    for step in (4, 12):
        shutil.copytree(folder, tmp_path / "run" / "exports" / f"step-{step}")
    write_recipe(tmp_path / "run" / "recipe.yaml", content)
    newest = tmp_path / "run" / "exports" / "step-12"
    assert generate.weights_of(path, step=None, adapter=None) == str(newest)
    assert generate.weights_of(path, step=4, adapter=None).endswith("step-4")
    assert generate.weights_of(newest.parent.parent, step=None, adapter=None) == str(newest)


def test_an_adapter_answers_on_its_base(folder: Path, prompts: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = LlamaForCausalLM.from_pretrained(folder)
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    byte_tokenizer().save_pretrained(tmp_path / "merged")
    said = []
    for source, more in (folder, ["--adapter", tmp_path / "adapter"]), (tmp_path / "merged", []):
        out = tmp_path / f"{len(said)}.jsonl"
        words = ("--input", prompts, "--output", out, "--max-new-tokens", 12)
        result = run(source, *words, *more)
        assert result.exit_code == 0, result.exception
        said.append(answers(out))
    assert said[0] == said[1]
    assert said[0] != [{**r, "answer": expected(folder, t, 12)} for r, t in zip(ROWS, TEXTS)]
    result = run(folder, "--adapter", folder, "--input", prompts, "--output", tmp_path / "o")
    assert "it is no adapter" in str(result.exception)
