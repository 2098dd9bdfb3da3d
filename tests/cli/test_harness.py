"""`arctic-train evaluate --harness`: what the harness is asked, and, where it is installed, what it finds."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import LlamaConfig, LlamaForCausalLM

from arctic_like.cli import evaluate, harness
from arctic_like.errors import RecipeError, RunError
from arctic_like.tokenizer.byte import byte_tokenizer

FAKE = {
    "__init__.py": """
import json, os

def simple_evaluate(model, tasks, task_manager, **arguments):
    asked = {"model": type(model.pretrained).__name__, "training": model.pretrained.training,
             "tokenizer": len(model.tokenizer), "own": model.own, "tasks": tasks,
             "include_path": task_manager.include_path, "arguments": arguments}
    with open(os.environ["ASKED"], "w") as file:
        json.dump(asked, file)
    if "broken" in tasks:
        raise ConnectionError("no network")
    return {"results": {task: {"alias": task, "acc,none": 0.5, "acc_stderr,none": 0.25} for task in tasks},
            "versions": {task: 1.0 for task in tasks}, "n-shot": {task: 0 for task in tasks}}
""",
    "tasks/__init__.py": """
class TaskManager:
    all_tasks = ["arc_easy", "arc_challenge", "broken"]

    def __init__(self, include_path=None):
        self.include_path = include_path

    def match_tasks(self, names):
        import fnmatch
        return [task for task in self.all_tasks if any(fnmatch.fnmatch(task, n) for n in names)]
""",
    "models/__init__.py": "",
    "models/huggingface.py": """
class HFLM:
    def __init__(self, pretrained, tokenizer, **own):
        self.pretrained, self.tokenizer, self.own = pretrained, tokenizer, own
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=262, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=96, initializer_range=0.4,
        bos_token_id=None, eos_token_id=257, pad_token_id=256,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("harness") / "model"
    LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that notes what it is asked; returns where."""
    for name, text in FAKE.items():
        path = tmp_path / "fake" / "lm_eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in [one for one in sys.modules if one.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    monkeypatch.setenv("ASKED", str(tmp_path / "asked.json"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "asked.json"  # type: ignore[misc]
    for name in [one for one in sys.modules if one.split(".")[0] == "lm_eval"]:
        del sys.modules[name]


def run(*words: Any) -> Result:
    return CliRunner().invoke(
        evaluate.command, [str(word) for word in words], standalone_mode=False
    )


def test_the_harness_has_the_model_and_what_it_is_told(folder: Path, fake: Path) -> None:
    done = run(folder, "--harness", "arc_*", "num_fewshot=5", "limit=0.5", "batch_size=4",
               "apply_chat_template=true", "include_path=mine", "device=cpu")  # fmt: skip
    assert done.exception is None
    asked = json.loads(fake.read_text())
    assert asked == {
        "model": "LlamaForCausalLM", "training": False, "tokenizer": 262, "own": {"batch_size": 4},
        "tasks": ["arc_easy", "arc_challenge"], "include_path": "mine",
        "arguments": {"num_fewshot": 5, "limit": 0.5, "apply_chat_template": True, "log_samples": False},
    }  # fmt: skip
    written = json.loads(Path("harness.json").read_text())
    assert written["results"]["arc_easy"] == {
        "alias": "arc_easy",
        "acc,none": 0.5,
        "acc_stderr,none": 0.25,
    }
    assert written["weights"] == str(folder)
    assert written["arguments"]["limit"] == 0.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--harness", "arc_esay"], "has no task 'arc_esay'"),
        (["--harness", "arc_easy", "limmit=3"], "did you mean limit="),
        (["--harness", "arc_easy", "num_fewshot=many"], "expected is int"),
        (["--harness", "arc_easy", "num_fewshot=true"], "expected is int"),
    ],
)
def test_what_is_misspelt_is_named(folder: Path, fake: Path, words: list[str], said: str) -> None:
    found = run(folder, *words).exception
    assert isinstance(found, RecipeError)
    assert said in str(found)
    assert not fake.exists()


def test_what_goes_wrong_inside_is_said(folder: Path, fake: Path) -> None:
    found = run(folder, "--harness", "broken", "device=cpu").exception
    assert isinstance(found, RunError)
    assert "ConnectionError: no network" in str(found)


def test_without_the_package_its_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    found = run(folder, "--harness", "arc_easy").exception
    assert isinstance(found, RecipeError)
    assert "arctic-like[harness]" in str(found)


def test_options_of_the_launcher_are_refused(folder: Path) -> None:
    found = run(folder, "--harness", "arc_easy", "--num_gpus", "2").exception
    assert "one process" in str(found)


TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: " "
metric_list: [{metric: acc}]
"""


def test_the_harness_itself_agrees_with_sums_of_log_probabilities(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task of multiple choice in a folder of one's own: the choice with the highest probability."""
    pytest.importorskip("lm_eval.models.huggingface")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    names = ["red", "green", "blue", "black"]
    rows = [{"question": f"{n} is", "choices": names, "answer": n % 4} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    task = TASK.replace("DATA", str(tmp_path / "rows.jsonl"))
    (tmp_path / "tasks" / "colours.yaml").write_text(task)
    target = tmp_path / "found.json"
    done = run(folder, "--harness", "colours", f"include_path={tmp_path / 'tasks'}", "device=cpu",
               "bootstrap_iters=0", "--output", target)  # fmt: skip
    assert done.exception is None
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), byte_tokenizer()
    right = 0
    for row in rows:
        scores = []
        for choice in names:
            ids = tokenizer(f"{row['question']} {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            start = len(str(row["question"]).encode())
            scores.append(
                math.fsum(float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids)))
            )
        right += scores.index(max(scores)) == row["answer"]
    found = json.loads(target.read_text())
    assert found["results"]["colours"]["acc,none"] == pytest.approx(right / len(rows))
    assert 0 < right < len(rows)


def test_every_argument_is_one_of_the_harness() -> None:
    """The names that are passed on exist there."""
    lm_eval = pytest.importorskip("lm_eval")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    import inspect

    known = {*inspect.signature(lm_eval.simple_evaluate).parameters,
             *inspect.signature(huggingface.HFLM.__init__).parameters}  # fmt: skip
    assert harness.ARGUMENTS.keys() - known == {"include_path"}
