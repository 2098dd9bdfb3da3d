"""What the exporters write computes what the model computes, read by the programs that it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from arctic_like import load_recipe
from arctic_like.api import execute
from arctic_like.errors import RecipeError
from arctic_like.stop import StopRequest
from tests.integration.surface_parts import Net, Points
from tests.integration.tools import drive, write_recipe

HERE = "tests.integration.surface_parts"
PARTS = str(Path(__file__).parents[1] / "integration/surface_parts.py")
EXPORTERS = [{"type": name} for name in ("safetensors", "torchscript", "onnx")]


def content(**changes: Any) -> dict[str, Any]:
    return {
        "type": "supervised", "device": "cpu", "seed": 5, "criterion": "mse",
        "model": {"type": "torch", "class": f"{HERE}.Net"},
        "data": {"type": "torch", "train": {"class": f"{HERE}.Points"}},
        "optimizer": {"type": "adamw", "learning_rate": 0.05}, "train_iters": 3,
        "micro_batch_size": 2, "global_batch_size": 4, "exporters": EXPORTERS,
        "logger": {"level": "WARNING"},
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The run directory, and the model at the end of training."""
    folder = tmp_path_factory.mktemp("exporters")
    held: list[Any] = []
    path = write_recipe(folder / "recipe.yaml", content())
    execute(load_recipe(path), output_dir=folder / "run", resume="", stop=StopRequest(),
            inspect=lambda trainer: held.append(trainer.module))  # fmt: skip
    return folder / "run", held[0]


def test_safetensors_has_the_weights(run: tuple[Path, Any]) -> None:
    from safetensors.torch import load_file

    found = load_file(run[0] / "exports/model.safetensors")
    expected = run[1].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    plain = Net()
    assert not torch.equal(plain.head.weight, found["head.weight"])
    plain.load_state_dict(found)


def test_torchscript_computes_the_same(run: tuple[Path, Any]) -> None:
    x = Points(size=7).x
    program = torch.jit.load(str(run[0] / "exports/model.pt"))
    with torch.no_grad():
        assert torch.allclose(program(x), run[1](x), atol=1e-7)


def test_onnx_computes_the_same_for_any_number_of_rows(run: tuple[Path, Any]) -> None:
    """Through the reference implementation of ONNX, which knows no torch."""
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(run[0] / "exports/model.onnx")
    onnx.checker.check_model(model, full_check=True)
    for size in (1, 7):
        x = Points(size=size).x
        (found,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(found), run[1](x), atol=1e-6)


def test_nothing_else_lies_there(run: tuple[Path, Any]) -> None:
    assert sorted(p.name for p in (run[0] / "exports").iterdir()) == [
        "model.onnx", "model.pt", "model.safetensors",
    ]  # fmt: skip


@pytest.mark.full
def test_weights_that_two_ranks_share_are_exported_whole(
    run: tuple[Path, Any], tmp_path: Path
) -> None:
    """ZeRO 3: no rank has them all, and DeepSpeed has replaced torch's `linear`."""
    sections = {"deepspeed": {"zero_optimization": {"stage": 3}}, "micro_batch_size": 1}
    exporters = [{"type": "safetensors", "file": "whole.safetensors"}, {"type": "torchscript"}]
    changes = {**sections, "exporters": exporters}
    path = write_recipe(tmp_path / "two.yaml", content(**changes, code=PARTS))
    path.write_text(path.read_text().replace(f"{HERE}.", ""))  # the names in that file
    drive([{"recipe": str(path), "output_dir": str(tmp_path / "two")}], ranks=2, folder=tmp_path)
    from safetensors.torch import load_file

    found = load_file(tmp_path / "two/exports/whole.safetensors")
    for name, expected in run[1].state_dict().items():
        assert torch.allclose(found[name], expected, atol=1e-6), name
    x = Points(size=7).x
    program = torch.jit.load(str(tmp_path / "two/exports/model.pt"))
    with torch.no_grad():
        assert torch.allclose(program(x), run[1](x), atol=1e-6)


def test_a_missing_extra_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "onnx" else real(name, *a)
    )
    path = write_recipe(tmp_path / "recipe.yaml", content())
    with pytest.raises(RecipeError, match=r"arctic-like\[onnx\]"):
        execute(load_recipe(path), output_dir=tmp_path / "run", resume="", stop=StopRequest())
    assert not (tmp_path / "run").exists()
