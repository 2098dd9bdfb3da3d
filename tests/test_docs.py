"""The documents: every recipe in them validates, every example runs, the reference is current."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from arctic_like import load_recipe, run
from arctic_like.cli.main import VERBS, Verbs

ROOT = Path(__file__).parent.parent
README, CUSTOM = ROOT / "README.md", ROOT / "docs" / "custom_trainer.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

TINY = [
    "train_iters=2", "eval_at_start=false", "eval_interval=0", "checkpoint=[]", "device=cpu",
    "micro_batch_size=4", "global_batch_size=8", "train_log_iter_interval=1",
]  # fmt: skip
TINY_MODEL = [
    "model.config.hidden_size=32", "model.config.intermediate_size=48",
    "model.config.num_hidden_layers=1", "model.config.num_attention_heads=2",
    "model.config.num_key_value_heads=2", "eval_at_end=true", "scheduler.warmup_steps=1",
]  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A fenced block of a page whose first line is the name of a file."""

    language: str
    file: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = []
    for language, body in re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.S | re.M):
        name = re.match(r"# ([\w/.-]+\.\w+)", body)
        assert name, f"{page.name}: a block does not begin with the name of its file:\n{body}"
        found.append(Block(language, name[1], body))
    return found


def recipes(page: Path) -> list[str]:
    return [block.file for block in blocks(page) if block.language == "yaml"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `recipes/` with a small part of its data and the files that the pages show.

    One for all tests: a trainer of one name cannot come from two files in a process.
    """
    target = tmp_path_factory.mktemp("docs") / "recipes"
    shutil.copytree(ROOT / "recipes", target, ignore=shutil.ignore_patterns("*.jsonl"))
    for data in (ROOT / "recipes" / "data").glob("*.jsonl"):
        lines = data.read_text().splitlines(keepends=True)[:60]
        (target / "data" / data.name).write_text("".join(lines))
    for block in [*blocks(README), *blocks(CUSTOM)]:
        if block.file != "train.py":
            (target / block.file).write_text(block.text)
    return target


def test_the_pages_have_the_blocks_that_are_looked_at() -> None:
    assert recipes(README) == ["sft.yaml"]
    assert len(recipes(CUSTOM)) == 5


@pytest.mark.parametrize("name", [*recipes(README), *recipes(CUSTOM)])
def test_every_recipe_on_a_page_validates(folder: Path, name: str) -> None:
    assert load_recipe(folder / name, []).trainer.name


@pytest.mark.parametrize("name", recipes(CUSTOM))
def test_every_example_trains(folder: Path, name: str, tmp_path: Path) -> None:
    overrides = [*TINY, f"output_dir={tmp_path / 'run'}"]
    if "extends" in (folder / name).read_text():
        overrides += TINY_MODEL
    result = run(load_recipe(folder / name, overrides))
    assert result.steps == 2
    assert result.metrics["eval/loss"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert len([line for line in lines if "grad_norm" in line]) == 2
    if name == "smooth.yaml":
        assert all("nll" in line for line in lines if "grad_norm" in line)


def test_the_example_for_any_torch_model_learns(folder: Path, tmp_path: Path) -> None:
    result = run(load_recipe(folder / "sine.yaml", [f"output_dir={tmp_path / 'run'}"]))
    assert result.steps == 20 * 1024 // 64
    assert result.metrics["eval/loss"] < 0.05  # the variance of a sine is about one half


def test_the_readme_and_the_page_show_the_same_trainer(folder: Path) -> None:
    in_readme = next(block for block in blocks(README) if block.language == "python")
    in_page = blocks(CUSTOM)[0]
    assert in_readme.text.partition("\n")[2] == in_page.text.partition("\n")[2]


def test_train_py_beside_a_recipe_needs_no_code_key(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(blocks(README)[1].text)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(blocks(README)[0].text.replace("type: sft\n", "type: focal_sft\n", 1))
    done = subprocess.run(
        [sys.executable, "-m", "arctic_like", "validate", str(recipe)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_reference_is_current() -> None:
    # In a process of its own: other tests register parts that the page must not have.
    code = (
        "import importlib.util, pathlib, sys; "
        f"spec = importlib.util.spec_from_file_location('reference', {str(script())!r}); "
        "page = importlib.util.module_from_spec(spec); spec.loader.exec_module(page); "
        "sys.exit(page.PAGE.read_text() != page.page())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert done.returncode == 0, "docs/recipe.md is old: make docs"


def script() -> Path:
    path = ROOT / "docs" / "generate_reference.py"
    assert importlib.util.spec_from_file_location("reference", path)
    return path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings(text)}
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in anchors, anchor


COMMANDS = [
    (page.name, line)
    for page in PAGES
    for line in re.findall(r"^    (?:.*\| )?(arctic-train .+)$", page.read_text(), re.M)
]


LAUNCHES = {
    "": (),
    "resume": ("--step",),
    "evaluate": ("--model", "--step", "--output", "--harness"),
    "profile": ("--steps", "--output"),
}
"""Verbs whose other options are the launcher's, with their own, each of which has a value."""


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_every_command_on_a_page_can_be_given(page: str, line: str) -> None:
    """Its verb is one, its options are the verb's or the launcher's, its recipe lies where it says."""
    from arctic_like.cli.launcher_options import parse_launcher_options

    words = shlex.split(re.sub(r"\[.*?\]|…", "", line), comments=True)[1:]
    verb = words.pop(0) if words[0] in VERBS else ""
    shown = {
        f"recipes/{name}"
        for one in PAGES
        for name in re.findall(r"^# (\S+\.yaml)$", one.read_text(), re.M)
    }
    for word in words:
        assert not word.startswith("recipes/") or (ROOT / word).exists() or word in shown, line
    if verb not in LAUNCHES:
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert options <= options_of(verb, words), line
        return
    for name in LAUNCHES[verb]:
        if name in words:
            del words[words.index(name) : words.index(name) + 2]
    first = next((n for n, word in enumerate(words) if word.startswith("--")), len(words))
    parse_launcher_options(words[first:])


def options_of(verb: str, words: list[str]) -> set[str]:
    """The options that a verb has, or its part that the words name (`cache remove`)."""
    command: Any = Verbs().get_command(click.Context(click.Group()), verb)
    own = {name for parameter in command.params for name in parameter.opts}
    part = getattr(command, "commands", {}).get(next(iter(words), ""))
    return own | ({name for p in part.params for name in p.opts} if part else set())


def test_the_commands_are_looked_at() -> None:
    assert len(COMMANDS) > 40
    assert {"generate.md", "evaluate.md", "speculator.md"} <= {page for page, _ in COMMANDS}


def test_rows_on_the_page_of_prompts_are_read(tmp_path: Path) -> None:
    from arctic_like.cli.prompt_rows import read_rows

    rows = re.findall(r"^    (\{.*\})$", (ROOT / "docs/generate.md").read_text(), re.M)
    assert len(rows) == 3
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    assert [row.messages is None for row in read_rows(tmp_path / "prompts.jsonl", answer_key="answer")] == [
        True, False, False,
    ]  # fmt: skip


def test_words_for_the_harness_on_the_page_are_known() -> None:
    from arctic_like.cli.harness import ARGUMENTS, read_request

    text = (ROOT / "docs/evaluate.md").read_text()
    for tasks, words in re.findall(
        r"^    arctic-train evaluate \S+ --harness (\S+) (.+)$", text, re.M
    ):
        assert read_request(tasks, words.split()).tasks
    named = set(
        re.findall(r"`(\w+)`", text.split("under its own names")[1].split("One process")[0])
    )
    assert named == set(ARGUMENTS)


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", text, re.M)


def test_the_readme_has_every_verb_and_no_other() -> None:
    table = re.findall(r"^\| `arctic-train (\w+)", README.read_text(), re.M)
    assert set(table) - {"RECIPE"} == set(VERBS)
    assert len(table) == len(VERBS) + 1


def test_every_make_target_on_a_page_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named: set[Any] = set()
    for page in PAGES:
        named |= set(re.findall(r"(?:^    |`)make ([a-z-]+)", page.read_text(), re.M))
    assert len(named) >= 5
    assert named <= targets
