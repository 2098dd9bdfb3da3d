"""`arctic-train inspect`: the trained text exactly marked, on terminals, in pipes and on a page."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from arctic_like import logs
from arctic_like.cli import inspect_text
from arctic_like.cli.inspect_words import visible
from arctic_like.cli.main import main
from arctic_like.data.decoding import Span
from tests.integration.tools import recipe, write_recipe

WILD = 'naïve 🧊 ⟦x⟧ </pre><script>alert("1")</script>\n\tend \x1b[31m \u202e ü&amp;'
QUESTION = "2 < 3 & \x07?"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    rows = [
        [("user", QUESTION), ("assistant", WILD), ("user", "more"), ("assistant", "")],
        [("user", "hi"), ("assistant", "short")],
        [("user", "hi"), ("assistant", "short")],
        [("user", "hi"), ("assistant", "z" * 300)],
    ]
    data = tmp_path / "talks.jsonl"
    data.write_text("".join(
        json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) + "\n" for row in rows
    ))  # fmt: skip
    held = tmp_path / "held.jsonl"
    held.write_text(data.read_text().splitlines()[1] + "\n")
    content = recipe(data, data__eval_sources={"held": [str(held)]}, data__long_samples="drop")
    write_recipe(tmp_path / "r.yaml", content)
    return tmp_path


def shown(capsys, *words: str) -> str:
    assert main(["inspect", "r.yaml", *words]) == 0, capsys.readouterr().err
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_a_pipe_gets_marks_and_no_escape_codes(folder, capsys):
    out = shown(capsys, "data.pack_samples=false", "--index", "0")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\u202e]", out)
    escaped = (
        WILD.replace("⟦", r"\u27e6").replace("⟧", r"\u27e7")
        .replace("\n", "↵\n").replace("\t", "⇥\t").replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    )  # fmt: skip
    assert (
        f"<|user|>{QUESTION[:-2]}\\x07?<|end|><|assistant|>⟦{escaped}<|end|>⟧"
        "<|user|>more<|end|><|assistant|>⟦<|end|>⟧\n"
    ) in out
    tokens = 6 + 2 + len((QUESTION + WILD + "more").encode())
    trained = len(WILD.encode()) + 2
    assert f"━━ sample 0 of 3: {tokens} tokens, {trained} trained ━" in out
    assert f"── talks.jsonl:1: {tokens} tokens, {trained} trained ─" in out
    text = out[: out.index("<|user|>")]
    assert all(len(line) <= 80 for line in text.splitlines())


def test_the_numbers(folder, capsys):
    out = " ".join(shown(capsys, "--samples", "0").split())
    lengths = [8 + len((QUESTION + WILD + "more").encode()), 11, 11, 306]
    trained = len(WILD.encode()) + 2 + 6 + 6
    tokens = sum(lengths[:3])
    assert "samples 1 of up to 128 tokens" in out
    assert f"{tokens / 128:.1%} filled" in out
    assert "documents 4, 1 too long, 1 dropped" in out
    assert f"tokens {tokens}, of which {trained} ({trained / tokens:.1%}) are trained" in out
    assert "duplicates 1 document (25.0%) repeats another" in out
    assert "2 times: talks.jsonl:2 = talks.jsonl:3" in out
    assert "1 document of held is in this set too" in out
    assert (
        f"11 to 306 tokens, median {(11 + lengths[0]) / 2:.0f}, mean {sum(lengths) / 4:.1f}" in out
    )
    assert "sample 0" not in out


def test_borders_in_a_pack(folder, capsys):
    out = shown(capsys, "--index", "0")
    heads = re.findall(r"^── (talks\.jsonl:\d): 11 tokens, 6 trained ─+$", out, re.M)
    assert sorted(heads) == ["talks.jsonl:2", "talks.jsonl:3"]
    assert out.count("<|user|>hi<|end|><|assistant|>⟦short<|end|>⟧\n") == 2
    assert "3 documents" in out


def test_another_set_and_what_is_drawn(folder, capsys):
    out = shown(capsys, "--set", "held", "--samples", "9")
    assert out.startswith("held\n")
    assert out.count("━━ sample") == 1
    first = shown(capsys, "data.pack_samples=false", "--samples", "2", "--seed", "1")
    assert shown(capsys, "data.pack_samples=false", "--samples", "2", "--seed", "1") == first
    assert first.count("━━ sample") == 2


def test_preferences(folder, capsys):
    rows = [{"prompt": "p", "chosen": "yes", "rejected": "no"}]
    (folder / "p.jsonl").write_text(json.dumps(rows[0]) + "\n")
    words = [
        "type=dpo",
        "data.type=dpo",
        "data.sources=[p.jsonl]",
        "data.eval_sources={held: [p.jsonl]}",
    ]
    assert main(["inspect", "r.yaml", *words]) == 0
    out = capsys.readouterr().out
    assert "── p.jsonl:1 (pair 0, chosen): 8 tokens, 4 trained ─" in out
    assert "<|user|>p<|end|><|assistant|>⟦no<|end|>⟧" in out
    assert "  samples     1 of up to 2 × 128 tokens, 5.9% filled\n  pairs       1\n" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--set", "hold"], ["--set", "'hold'", "did you mean 'held'?"]),
        (["--index", "7"], ["--index", "7", "1 samples"]),
        (["--html", "no/such/page.html"], ["--html", "no such folder"]),
        (["data.sources=[gone.jsonl]"], ["gone.jsonl"]),
        (["data.streaming=true"], ["data.streaming", "data.streaming=false"]),
    ],
)
def test_bad_commands(folder, capsys, words, expected):
    assert main(["inspect", "r.yaml", *words]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in err
    for word in expected:
        assert word in err
    assert not (folder / "runs").exists()


def test_the_example_on_the_page_is_what_is_printed(folder, capsys):
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    example = re.search(r"^    ── .*\n    <\|user\|>.*\n", text, re.M)
    assert example
    rows = [("hi", "short")] * 16 + [("6 × 7?", "It is 42")]
    (folder / "talks.jsonl").write_text(
        "".join(json.dumps({"user": user, "assistant": answer}) + "\n" for user, answer in rows)
    )
    out = shown(capsys, "data.pack_samples=false", "--index", "16")
    assert out.endswith(re.sub(r"^    ", "", example[0], flags=re.M))


class Reader(HTMLParser):
    """What a browser would show, and with which classes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append((tag, dict(attrs).get("class", "")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any(tag == "pre" for tag, _ in self.open):
            self.texts.append((data, self.open[-1][1]))


def test_the_page_is_whole_safe_and_exact(folder, capsys):
    assert (
        main(["inspect", "r.yaml", "data.pack_samples=false", "--index", "0", "--html", "p.html"])
        == 0
    )
    assert capsys.readouterr().out == ""
    page = (folder / "p.html").read_text()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", page)
    reader = Reader(page)
    assert reader.open == []
    assert not reader.tags & {"script", "link", "img", "iframe", "a"}
    assert not reader.attributes & {"src", "href", "onclick"}
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    trained = "".join(text for text, kinds in reader.texts if "t" in kinds.split())
    assert trained == visible(WILD) + "<|end|><|end|>"
    special = [text for text, kinds in reader.texts if "s" in kinds.split()]
    assert special == ["<|user|>", "<|end|>", "<|assistant|>", "<|end|>"] * 2
    whole = "".join(text for text, _ in reader.texts)
    assert whole.startswith(f"<|user|>{visible(QUESTION)}<|end|><|assistant|>{visible(WILD)}")
    # what the terminal says of the set, the page says too
    said = re.sub(r"<[^>]*>", " ", page)
    for words in shown(capsys, "data.pack_samples=false", "--samples", "0").splitlines()[1:6]:
        for word in words.split():
            assert word in said


def test_colours_where_they_are_wanted(monkeypatch):
    lines = list(inspect_text.sample_lines(
        VIEW, 1, coloured=True, names=["<|end|>"]))  # fmt: skip
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=80)
    inspect_text.write(lines, console)
    assert "asked\x1b[32manswer\x1b[0m\x1b[7;32m<|end|>\x1b[0m" in out.getvalue()
    assert "⟦" not in out.getvalue()


def test_no_color_is_heard(folder, capsys, monkeypatch):
    for variables, plain in (({"NO_COLOR": "1"}, True), ({"TERM": "dumb"}, True), ({}, False)):
        with monkeypatch.context() as patch:
            patch.setenv("TERM", "xterm")
            patch.delenv("NO_COLOR", raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setattr(logs, "console", lambda: Console(force_terminal=True, width=80))
            out = shown(capsys, "--index", "0")
        assert ("\x1b" not in out) is plain
        assert ("⟦short<|end|>⟧" in out) is plain


def _view():
    from arctic_like.data.inspection import DocumentView, SampleView

    spans = [Span("asked", False), Span("answer", True), Span("<|end|>", True, special=True)]
    return SampleView(0, [DocumentView("a:1", "", 3, 2, spans)])


VIEW = _view()


def test_a_text_that_reads_like_a_special_token_is_told_apart():
    spans = [Span("a <|end|> b", False), Span("<|end|>", False, special=True)]
    assert inspect_text._marked(spans, ["<|end|>"]) == "a \\<|end|> b<|end|>"


def test_bars_are_seen_from_the_smallest_on():
    assert inspect_text._bar(0, 40) == ""
    assert inspect_text._bar(1e-9, 40) == "▏"
    assert inspect_text._bar(1, 40) == "█" * 40
    assert inspect_text._bar(0.5, 1) == "▌"
