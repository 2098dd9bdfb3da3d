"""The quickstart's data: reproducible, no shared prompt, not to be answered by a constant."""

from __future__ import annotations

import json
import runpy
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "recipes" / "data"
TRAIN, HELD_OUT = "quickstart_train.jsonl", "quickstart_heldout.jsonl"


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module", params=[TRAIN, HELD_OUT])
def rows(request) -> list[dict]:
    return read(request.param)


def questions(rows: list[dict]) -> set[str]:
    return {m["content"] for row in rows for m in row["messages"] if m["role"] == "user"}


def test_the_script_writes_the_files_byte_for_byte(tmp_path):
    script = DATA / "make_quickstart.py"
    # -I -S: the standard library and nothing else.
    subprocess.run([sys.executable, "-I", "-S", str(script), str(tmp_path)], check=True)
    for name in (TRAIN, HELD_OUT):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()
    assert sum((DATA / name).stat().st_size for name in (TRAIN, HELD_OUT)) < 5_000_000


def test_rows_are_conversations_that_end_with_an_answer(rows):
    assert len(rows) >= 500
    for row in rows:
        assert row.keys() == {"messages", "kind"}
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        for message in row["messages"]:
            assert message["content"]
            assert message["content"] == message["content"].strip()


def test_no_question_of_one_file_is_in_the_other():
    train, held_out = questions(read(TRAIN)), questions(read(HELD_OUT))
    assert len(held_out) >= 500
    assert not train & held_out


def test_no_conversation_is_there_twice(rows):
    texts = Counter(json.dumps(row["messages"]) for row in rows)
    assert max(texts.values()) == 1


def test_no_constant_answer_is_right_more_than_one_time_in_ten(rows):
    answers = [(row["kind"], row["messages"][-1]["content"]) for row in rows]
    kinds = Counter(kind for kind, _ in answers)
    assert len(kinds) >= 6
    overall = Counter(answer for _, answer in answers)
    assert max(overall.values()) <= len(rows) / 10
    for kind, number in kinds.items():
        most = max(Counter(answer for k, answer in answers if k == kind).values())
        assert most <= number / 10, kind


def test_each_question_has_one_answer():
    answers: dict[str, str] = {}
    for name in (TRAIN, HELD_OUT):
        for row in read(name):
            for asked, said in zip(row["messages"][::2], row["messages"][1::2], strict=True):
                assert answers.setdefault(asked["content"], said["content"]) == said["content"]


def independent_answer(kind: str, question: str) -> str:
    """The right answer, worked out from the question's text alone."""
    words = question.split()
    given = words[-1]
    low = string.ascii_lowercase
    return {
        "repeat": lambda: given,
        "shift": lambda: given.translate(str.maketrans(low, low[1:] + low[0])),
        "count": lambda: str(sum(1 for _ in given)),
        "first": lambda: words[-3],
        "second": lambda: words[-2],
        "last": lambda: given,
    }[kind]()


def test_the_answers_are_right(rows):
    for row in rows:
        question, answer = (message["content"] for message in row["messages"][-2:])
        assert independent_answer(row["kind"], question) == answer


def test_the_script_does_nothing_when_imported():
    assert "main" in runpy.run_path(str(DATA / "make_quickstart.py"))
