"""`arctic-train` in this process: bad recipes, what reaches the launch, the verbs, and light imports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from arctic_like.cli import launch as launch_module
from arctic_like.cli.main import VERBS, main

GOOD = """
type: sft
model:
  config: {model_type: llama, hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4}
tokenizer: {type: byte}
data: {sources: [./rows.jsonl]}
optimizer: {lr: 1e-3}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "rows.jsonl").write_text("")  # the command looks whether it is there
    return tmp_path


@pytest.fixture
def launched(monkeypatch):
    """The calls that would start a run."""
    calls = []

    def launch(recipe, **kwargs):
        calls.append({"recipe": recipe, **kwargs})
        return 7

    monkeypatch.setattr(launch_module, "launch", launch)
    return calls


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


BAD = {
    "unknown key at the top": (GOOD + "sede: 1\n", ["bad.yaml:8", "sede", "'seed'"]),
    "unknown key in a part": (GOOD.replace("lr:", "larning_rate:"), ["bad.yaml:7", "optimizer.larning_rate",
                                                                 "'learning_rate'"]),
    "unknown key of another map": (GOOD + "learning_rate: 1\n", ["'optimizer.learning_rate'"]),
    "unknown key inside deepspeed": (GOOD + "deepspeed:\n  zero_optimisation: {stage: 3}\n",
                                     ["bad.yaml:9", "deepspeed.zero_optimisation", "zero_optimization"]),
    "nonsense ZeRO stage": (GOOD + "deepspeed: {zero_optimization: {stage: 5}}\n",
                            ["deepspeed.zero_optimization.stage", "5"]),
    "wrong type": (GOOD + "epochs: many\n", ["bad.yaml:8", "epochs", "'many'", "whole number"]),
    "a bool is no number": (GOOD + "seed: true\n", ["seed", "true", "whole number"]),
    "duplicate key": (GOOD + "type: causal\n", ["bad.yaml:8", "type", "line 2"]),
    "bad YAML": (GOOD + "a: [1, 2\n", ["bad.yaml:9", "not valid YAML", "column"]),
    "a tab": (GOOD + "logger:\n\tlevel: INFO\n", ["bad.yaml:9", "not valid YAML", "spaces"]),
    "a list": ("- a\n", ["bad.yaml:1", "no map"]),
    "unknown trainer": (GOOD.replace("sft", "stf"), ["bad.yaml:2", "'stf'", "did you mean 'sft'"]),
    "unknown part": (GOOD.replace("byte", "bite"), ["bad.yaml:5", "tokenizer.type", "'byte'"]),
    "incompatible factory": (GOOD.replace("data: {", "data: {type: dpo, "),
                             ["data.type", "DPODataFactory", "SFTTrainer", "'sft'"]),
    "contradictory batch sizes": (GOOD + "micro_batch_size: 2\ngradient_accumulation_steps: 3\n"
                                         "global_batch_size: 8\n", ["bad.yaml:10", "2 × 3", "derived"]),
    "a missing base": (GOOD + "extends: base.yaml\n", ["bad.yaml:8", "extends", "base.yaml"]),
    "missing code": (GOOD + "code: mine.py\n", ["bad.yaml:8", "mine.py"]),
    "an unset variable": (GOOD + "seed: ${env:NOT_SET_HERE}\n", ["bad.yaml:8", "NOT_SET_HERE"]),
    "no model": (GOOD.replace("  config: ", "  hf_config_kwargs: "), ["bad.yaml:3", "model"]),
    "not built yet": (GOOD + "expert_parallel_size: 2\n", ["expert_parallel_size"]),
    "an unknown loss": (GOOD.replace("type: sft", "type: dpo") + "loss: sigmod\n",
                        ["bad.yaml:8", "loss", "did you mean 'sigmoid'?"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_recipes(folder, launched, capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    text, expected = BAD[name]
    (folder / "bad.yaml").write_text(text)
    before = files(folder)
    assert main(["bad.yaml"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    flat = " ".join(err.split())
    for words in expected:
        assert words in flat
    assert "Traceback" not in err
    assert "pydantic" not in err
    assert len(err) < 1200
    # whatever does not name a path fits a terminal
    assert all(len(line) <= 80 for line in err.splitlines() if str(folder) not in line)
    assert files(folder) == before
    assert not launched


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["good.yaml", "--num_gpus", "2", "seed=3"], ["seed=3", "before the first --option"]),
        (["good.yaml", "--num_gpuz", "2"], ["did you mean --num_gpus?"]),
        (["good.yaml", "sed=3"], ["command line", "sed", "'seed'"]),
        (["good.yaml", "3"], ["key=value"]),
        (["god.yaml"], ["god.yaml", "no such file", "did you mean good.yaml?"]),
        (["good"], ["'good'", "did you mean good.yaml?"]),
        (["good.yml"], ["did you mean good.yaml?"]),
        (["validat", "good.yaml"], ["did you mean 'validate'?"]),
        (["traim"], ["neither a verb nor a recipe"]),
        (["nowhere/good.yaml"], ["no folder nowhere"]),
        (["."], ["is a folder"]),
        (["validate"], ["Missing argument"]),
        (["resume"], ["run directory"]),
        (["resume", "nowhere"], ["no such run directory"]),
        (["resume", "."], ["holds no run"]),
        (["resume", "nowhere", "--step", "x"], ["--step"]),
        (["list", "modle"], ["did you mean 'model'?"]),
        (["init", "stf"], ["did you mean 'sft'?"]),
        (["schema", "-o", "no/such/folder.json"], ["cannot be written"]),
        (["--nope"], ["No such option"]),
        (["validate", "good.yaml", "--prnt"], ["--print"]),
    ],
)  # fmt: skip
def test_bad_commands(folder, launched, capsys, words, expected):
    before = files(folder)
    assert main(words) == 2
    err = " ".join(capsys.readouterr().err.split())
    for word in expected:
        assert word in err
    assert "Traceback" not in err
    assert files(folder) == before
    assert not launched


def test_a_run_is_launched_with_everything_that_was_said(folder, launched):
    words = ["good.yaml", "seed=3", "optimizer.lr=1e-4", "--num_gpus", "2", "--master_port=29501"]
    assert main(words) == 7
    (call,) = launched
    assert call["recipe"].config.seed == 3
    assert call["overrides"] == ["seed=3", "optimizer.lr=1e-4"]
    assert call["launcher_options"] == ["--num_gpus", "2", "--master_port=29501"]
    assert call["argv"] == ["arctic-train", *words]
    assert call["resume"] == ""
    assert call["output_dir"].parent == Path("runs")
    assert call["output_dir"].name.startswith("good-2")
    assert files(folder) == ["good.yaml", "rows.jsonl"]


def test_a_directory_that_holds_a_run(folder, launched, capsys):
    run = folder / "out"
    run.mkdir()
    (run / "recipe.yaml").write_text(GOOD)
    assert main(["good.yaml", f"output_dir={run}"]) == 2
    err = capsys.readouterr().err
    for way_out in (f"arctic-train resume {run}", "another output_dir", "overwrite=true"):
        assert way_out in " ".join(err.split())
    assert not launched
    assert main(["good.yaml", "output_dir=out", "overwrite=true"]) == 7
    assert (
        main(["good.yaml", "output_dir=out", "checkpoint={type: deepspeed, auto_resume: true}"])
        == 7
    )
    assert [(call["output_dir"], call["resume"]) for call in launched] == [(run, ""), (run, "auto")]


def test_resume(folder, launched):
    run = folder / "runs" / "good-1"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(GOOD)
    (run / "rows.jsonl").write_text("")
    assert main(["resume", "runs/good-1"]) == 7
    assert main(["resume", "runs/good-1", "epochs=2", "--step", "12", "--num_gpus", "2"]) == 7
    assert main(["resume", "runs/good-1", "--num_gpus", "2", "--step=3"]) == 7
    assert [call["resume"] for call in launched] == ["latest", "step-12", "step-3"]
    assert launched[1]["overrides"] == ["epochs=2"]
    assert launched[0]["argv"] == ["arctic-train", "resume", "runs/good-1"]
    assert launched[1]["launcher_options"] == launched[2]["launcher_options"] == ["--num_gpus", "2"]
    assert {call["output_dir"] for call in launched} == {Path("runs/good-1")}
    assert launched[0]["recipe"].name == "good-1"


def test_validate(folder, capsys):
    assert main(["validate", "good.yaml", "seed=3"]) == 0
    assert "good.yaml is valid" in capsys.readouterr().out
    assert main(["validate", "good.yaml", "seed=3", "--print"]) == 0
    assert "seed: 3\n" in capsys.readouterr().out
    # declared, but not built yet: valid, and said
    assert main(["validate", "good.yaml", "expert_parallel_size=2", "skip_validation=true"]) == 0
    out, err = capsys.readouterr()
    assert "cannot run it yet" in out
    assert "expert_parallel_size" in err
    assert "skip_validation: has no effect" in err
    assert files(folder) == ["good.yaml", "rows.jsonl"]


def test_help_version_list_init_schema(folder, capsys):
    assert main(["--help"]) == 0
    help_text = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n  {verb} " in help_text
    assert all(len(line) <= 80 for line in help_text.splitlines())
    assert main(["good.yaml", "--help"]) == 0
    assert capsys.readouterr().out == help_text
    assert main(["resume", "--help"]) == 0
    assert "RUN_DIR [key=value …] [--step N]" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("arctic-train 0")
    assert main(["list"]) == 0
    listing = capsys.readouterr().out
    assert all(len(line) <= 80 for line in listing.splitlines())
    assert "cosine_with_floor" in listing
    assert main(["init", "causal"]) == 0
    (folder / "mine.yaml").write_text(capsys.readouterr().out)
    assert main(["validate", "mine.yaml"]) == 0
    assert main(["schema", "-o", "schema.json"]) == 0
    assert json.loads((folder / "schema.json").read_text())["$schema"].endswith("2020-12/schema")


def test_an_unexpected_error_keeps_its_traceback(folder, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(launch_module, "launch", broken)
    with pytest.raises(ZeroDivisionError):
        main(["good.yaml"])


HEAVY = (
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "tokenizers",
    "wandb",
    "numpy",
    "pyarrow",
)
LIGHT = [["--help"], ["validate", "good.yaml"], ["validate", "bad.yaml"], ["list"], ["init"], ["schema"],
         ["good.yaml", "--num_gpus", "2", "x=1"], ["profile", "--help"]]  # fmt: skip


@pytest.mark.parametrize("words", LIGHT, ids=" ".join)
def test_no_heavy_library_is_imported(folder, words):
    (folder / "bad.yaml").write_text(GOOD + "sede: 1\n")
    code = (
        f"import sys; from arctic_like.cli.main import main; main({words!r}); "
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_help_imports_no_verb():
    code = (
        "import sys; from arctic_like.cli.main import main; main(['--help']); "
        "print([m for m in ('pydantic', 'yaml', 'rich', 'arctic_like.registry') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
