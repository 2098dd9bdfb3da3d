"""Conversations to measure with: Python's standard library asked about itself, and a tokenizer.

A turn shows a function and asks what it does, asks for the code behind a description, or asks what a
module holds; the answer is the docstring, the source or a list. The pool of turns is some ten
megabytes of real text; conversations draw from it by a seed, so that any size can be had.
"""

from __future__ import annotations

import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else -%}{{ message['content'] + '<|im_end|>' }}{%- endif -%}{{ '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
"""ChatML, with the marks that TRL asks for where only answers are trained."""

UNMARKED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")

Turn = tuple[str, str]


@cache
def turns(limit: int = 12_000_000) -> list[Turn]:
    """(question, answer) from the standard library, until `limit` characters are there."""
    found: list[Turn] = []
    size = 0
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.rglob("*.py"), key=lambda path: (len(path.parts), path))
    for path in files:
        if "site-packages" in path.parts or size > limit:
            continue
        try:
            source = path.read_text("utf-8")
            module = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        lines = source.splitlines(keepends=True)
        for turn in _of(path.stem, module, lines):
            found.append(turn)
            size += len(turn[0]) + len(turn[1])
    return found


def _of(module: str, tree: ast.Module, lines: list[str]) -> Iterator[Turn]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        text = ast.get_docstring(node)
        code = "".join(lines[node.lineno - 1 : node.end_lineno])
        if not text or len(text) < 40 or len(code) > 6000:
            continue
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        yield f"What does the {kind} `{node.name}` of Python's `{module}` do?", text
        yield f"Show me how `{node.name}` of `{module}` is written.", f"```python\n{code}```"


def write(path: Path, *, size: int = 0, rows: int = 0, seed: int = 0, most_turns: int = 4) -> int:
    """Write conversations as JSON lines until the file has `size` bytes or `rows` rows; returns how
    many there are."""
    draw = random.Random(seed)
    pool = turns()
    written = count = 0
    with path.open("w") as file:
        while written < size or count < rows:
            messages = []
            for question, answer in draw.choices(pool, k=draw.randint(1, most_turns)):
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": answer})
            line = json.dumps({"messages": messages}) + "\n"
            file.write(line)
            written += len(line)
            count += 1
    return count


def write_short(path: Path, *, rows: int, seed: int = 0) -> None:
    """Conversations of one question each, the short ones: many rows of few tokens."""
    draw = random.Random(seed)
    pool = [turn for turn in turns() if len(turn[1]) < 600]
    with path.open("w") as file:
        for number in range(rows):
            question, answer = draw.choice(pool)
            messages = [
                {"role": "user", "content": f"{number}: {question}"},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def write_tokenizer(folder: Path, *, vocabulary: int = 32_768) -> None:
    """Train a byte-level BPE on a part of the pool and save it with the chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    pool = turns()
    core.train_from_iterator((text for turn in pool[::2] for text in turn), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
