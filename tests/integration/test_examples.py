"""The worked examples under `recipes/`, reduced, each judged by something that is not the example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arctic_like import load_recipe
from arctic_like.registry.named import find_object

from .tools import arctic_train, lines

RECIPES = Path(__file__).parents[2] / "recipes"


def run(recipe: str, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Start it as a user does; its lines."""
    done = arctic_train(
        str(RECIPES / recipe), f"output_dir={folder / 'run'}", "logger.level=WARNING", *overrides,
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return lines(folder / "run")


def last(found: list[dict[str, Any]], key: str) -> float:
    return [line[key] for line in found if key in line][-1]


def picture(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path)).astype(np.float64)


def test_digits_are_told_apart(tmp_path: Path) -> None:
    """97 %, in fewer epochs than the recipe has; accuracy by scikit-learn from the best weights."""
    import torch
    from safetensors.torch import load_file
    from sklearn.metrics import accuracy_score

    found = run("digits/classify.yaml", tmp_path, "epochs=6", "exporters=[{type: safetensors}]")
    assert last(found, "test/accuracy") >= 0.97
    assert (tmp_path / "run/confusion.png").stat().st_size > 10_000
    best = (tmp_path / "run/checkpoints/best").read_text().strip()
    scores = {line["step"]: line["eval/accuracy"] for line in found if "eval/accuracy" in line}
    assert scores[int(best.removeprefix("step-"))] == max(scores.values())

    load_recipe(RECIPES / "digits/classify.yaml")  # the names of its code file
    SmallNet, Digits = (find_object(name, place="") for name in ("SmallNet", "Digits"))
    model, unseen = SmallNet(num_classes=10).eval(), Digits("test")
    model.load_state_dict(load_file(tmp_path / "run/exports/model.safetensors"))
    with torch.no_grad():
        predicted = model(unseen.images).argmax(1)
    accuracy = accuracy_score(unseen.digits, predicted)
    assert last(found, "test/accuracy") == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.full
def test_digits_end_early(tmp_path: Path) -> None:
    """A patience of one ends the run long before its thirty epochs."""
    found = run("digits/classify.yaml", tmp_path,
                "callbacks=[{type: early_stopping, patience: 1, min_delta: 0.05}]")  # fmt: skip
    accuracies = [line["eval/accuracy"] for line in found if "eval/accuracy" in line]
    assert len(accuracies) < 10
    assert accuracies[-1] <= max(accuracies[:-1]) + 0.05
    assert last(found, "test/loss") > 0, "an early stop concludes the training: the test follows"


@pytest.mark.full
def test_the_generator_makes_digits(tmp_path: Path) -> None:
    """Its samples come nearer to what digits look like on average than those of its first weights."""
    from sklearn.datasets import load_digits

    found = run(
        "digits/gan.yaml", tmp_path, "train_iters=150", "train_log_iter_interval=25",
        "callbacks=[{type: sample_grid, every: 10}]", "checkpoint=[]",
    )  # fmt: skip
    assert {"loss", "critic/loss"} <= found[-1].keys()
    names = [f"step-{n}.png" for n in range(10, 151, 10)]
    assert sorted(p.name for p in (tmp_path / "run/samples").iterdir()) == sorted(names)
    digits = load_digits().images.mean(0) / 16

    def distance(name: str) -> float:
        pixels = picture(tmp_path / "run/samples" / name)[::6, ::6] / 255
        assert pixels.shape == (72, 72)
        mean = pixels.reshape(8, 9, 8, 9).mean((0, 2))[:8, :8]
        return float(np.abs(mean - digits).mean())

    first, final = distance("step-10.png"), distance("step-150.png")
    assert final < 0.5 * first, (first, final)


@pytest.mark.full
def test_the_splats_become_the_picture(tmp_path: Path) -> None:
    """The logged PSNR is that of the picture which was written, target and drawing side by side."""
    found = run("splats/fit.yaml", tmp_path, "train_iters=240", "eval_interval=80")
    psnr = [line["eval/psnr"] for line in found if "eval/psnr" in line]
    counts = [line["eval/gaussians"] for line in found if "eval/gaussians" in line]
    assert len(psnr) == 4
    assert counts[0] == 48
    assert counts[-1] > 60
    for name, logged in (("before.png", psnr[0]), ("after.png", psnr[-1])):
        pixels = picture(tmp_path / "run" / name)[::8, ::8] / 255
        assert pixels.shape == (64, 128, 3)
        target, drawn = np.split(pixels, 2, axis=1)
        seen = -10 * np.log10(np.square(target - drawn).mean())
        assert seen == pytest.approx(logged, abs=0.3), name
    colour = -10 * np.log10(np.square(target - target.mean((0, 1))).mean())
    assert psnr[-1] > colour + 4, "much better than the best picture of one colour"


def test_the_regression_is_as_good_as_least_squares(tmp_path: Path) -> None:
    """R² near that of linear regression on the same patients; the rate falls by halves."""
    from sklearn.datasets import load_diabetes
    from sklearn.linear_model import LinearRegression

    found = run("diabetes/regress.yaml", tmp_path)
    data = load_diabetes()
    unseen = np.arange(len(data.target)) % 5 == 0
    plain = LinearRegression().fit(data.data[~unseen], data.target[~unseen])
    expected = plain.score(data.data[unseen], data.target[unseen])
    assert last(found, "test/r2") > expected - 0.06
    rates = {line["learning_rate"] for line in found if "learning_rate" in line}
    assert len(rates) > 1
    assert all((1e-2 / rate) in (1, 2, 4, 8, 16, 32, 64) for rate in rates)
