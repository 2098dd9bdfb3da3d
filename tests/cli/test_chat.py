"""`arctic-train chat` with a tiny random model: what it says, what it prints, and how it ends."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM

from arctic_like.cli import chat
from arctic_like.errors import RecipeError
from arctic_like.tokenizer.byte import byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=262, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, initializer_range=0.4,
        bos_token_id=None, eos_token_id=257, pad_token_id=256,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("chat") / "model"
    LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def expected(folder, text: str, max_new_tokens: int) -> str:
    """Greedy, over the whole sequence each time, without a cache."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    ids = list(byte_tokenizer()(text)["input_ids"])
    new: list[int] = []
    while len(new) < max_new_tokens:
        with torch.no_grad():
            token = int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
        if token == 257:
            break
        new.append(token)
    return bytes(token for token in new if token < 256).decode(errors="replace")


def run(folder, *options, text):
    return CliRunner().invoke(chat.command, [str(folder), *options], input=text)


def test_without_a_terminal_only_the_answer_is_printed(folder):
    result = run(folder, "--max-new-tokens", "20", text="Who is it? ünï\n")
    assert result.exit_code == 0, result.exception
    said = expected(folder, "<|user|>Who is it? ünï<|end|><|assistant|>", 20)
    assert result.stdout == said + "\n"
    again = run(folder, "--max-new-tokens", "20", "--system", "s", text="Who is it? ünï\n")
    with_system = "<|system|>s<|end|><|user|>Who is it? ünï<|end|><|assistant|>"
    assert again.stdout == expected(folder, with_system, 20) + "\n" != result.stdout


def test_several_turns_reset_and_exit(folder, monkeypatch):
    monkeypatch.setattr(chat, "is_interactive", lambda: True)
    result = run(folder, "--max-new-tokens", "9", text="one\n\ntwo\n/reset\none\n/exit\nnever\n")
    assert result.exit_code == 0, result.exception
    first = expected(folder, "<|user|>one<|end|><|assistant|>", 9)
    history = f"<|user|>one<|end|><|assistant|>{first}<|end|><|user|>two<|end|><|assistant|>"
    second = expected(folder, history, 9)
    said = [part.strip("\n") for part in result.stdout.split("\n› ")]
    assert said[0].endswith(chat.HELP)
    assert said[1:] == [
        first.strip("\n"), "", second.strip("\n"), "(the conversation is forgotten)",
        first.strip("\n"), "",
    ]  # fmt: skip


def test_the_end_of_input_ends_it(folder, monkeypatch):
    monkeypatch.setattr(chat, "is_interactive", lambda: True)
    result = run(folder, text="")
    assert (result.exit_code, result.exception) == (0, None)


def test_control_c_stops_the_answer_and_then_the_chat(folder, monkeypatch):
    monkeypatch.setattr(chat, "is_interactive", lambda: True)
    lines = iter(["hello", "again", KeyboardInterrupt])
    seen: list[list[str]] = []

    def ask(_):
        line = next(lines)
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    class Interrupted(chat.TextStream):
        def put(self, value):
            super().put(value)
            if len(self._tokens) == 3:
                raise KeyboardInterrupt

    def generate(self, prompt, config, stream):
        seen.append(byte_tokenizer().decode(prompt))
        original(self, prompt, config, stream)

    original = chat.Conversation._generate
    monkeypatch.setattr(chat.Conversation, "_generate", generate)
    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(chat, "TextStream", Interrupted)
    result = run(folder, "--max-new-tokens", "9", text="")
    assert (result.exit_code, result.exception) == (0, None)
    assert result.stdout.count("(stopped)") == 2
    cut = expected(folder, "<|user|>hello<|end|><|assistant|>", 3)
    assert (
        seen[1] == f"<|user|>hello<|end|><|assistant|>{cut}<|end|><|user|>again<|end|><|assistant|>"
    )


def test_old_turns_give_way_to_new_ones(folder):
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    talk = chat.Conversation(model, byte_tokenizer(), max_new_tokens=8, system="sys")
    left_out = [talk.ask("x" * 30, write=lambda text: None) for _ in range(5)]
    assert left_out[0] == 0
    assert sum(left_out) > 0
    prompt, _ = talk._prompt()
    assert len(prompt) + 8 <= 128
    assert byte_tokenizer().decode(prompt).startswith("<|system|>sys<|end|><|user|>xxx")
    with pytest.raises(RecipeError, match="leaves no room"):
        talk.ask("y" * 200, write=lambda text: None)
    assert all("y" not in turn["content"] for turn in talk.turns)


def test_a_character_of_several_bytes_is_written_whole():
    written: list[str] = []
    stream = chat.TextStream(byte_tokenizer(), written.append, stop=[257])
    stream.put(torch.tensor([[1, 2, 3]]))
    for byte in "añ🦊b".encode():
        stream.put(torch.tensor([byte]))
    stream.put(torch.tensor([257]))
    stream.end()
    assert written == ["a", "ñ", "🦊", "b"]
    assert stream.text == "añ🦊b"


def test_temperature_draws(folder):
    options = ("--max-new-tokens", "16", "--temperature", "3")
    assert len({run(folder, *options, text="hello").stdout for _ in range(3)}) > 1


@pytest.mark.parametrize(
    ("make", "text", "expected"),
    [
        (lambda tmp, folder: tmp / "no", "hi", "there is no such folder"),
        (lambda tmp, folder: folder, " \n", "standard input is empty"),
    ],
)
def test_sentences(tmp_path, folder, make, text, expected):
    result = run(make(tmp_path, folder), text=text)
    assert isinstance(result.exception, RecipeError)
    assert expected in str(result.exception)


def test_a_folder_with_nothing_to_talk_to(tmp_path):
    result = run(tmp_path, text="hi")
    assert getattr(result.exception, "exit_code", None) in (1, 2)
    assert str(tmp_path) in str(result.exception)
