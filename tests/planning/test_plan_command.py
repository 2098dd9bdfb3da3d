"""`arctic-train plan`: what it says, and that what it advises is so."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from arctic_like.cli.plan import _shown
from arctic_like.planning.devices import DEVICES
from arctic_like.planning.timing import LINK_EFFICIENCY
from tests.integration.tools import arctic_train, recipe, write_conversations, write_recipe
from tests.planning.matrix import LLAMA

BIG = {**LLAMA, "hidden_size": 512, "intermediate_size": 1024, "vocab_size": 4096}
"""Some 9 million parameters: 162 MB of weights, gradients and states in bf16."""

LAYERS = "deepspeed.tensor_parallel.autotp_size=2"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    data = write_conversations(folder / "conversations.jsonl")
    content = recipe(
        data, model__config=BIG, model__dtype="bf16", micro_batch_size=4, train_iters=5,
        data__pack_samples=True, deepspeed__zero_optimization__stage=2,
    )  # fmt: skip
    return write_recipe(folder / "big.yaml", content)


def planned(path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    done = arctic_train("plan", str(path), *words, "--json", cwd=path.parent)
    assert done.stdout.startswith("{"), done.stdout[-2000:] + done.stderr[-4000:]
    return done.returncode, json.loads(done.stdout)


@pytest.mark.full
def test_says_what_does_not_fit_and_the_change_that_does_it(path: Path) -> None:
    _, alone = planned(path, "--gpus", "1")
    room = alone["peak"] + 2**30 - alone["peak_by_kind"]["activations"] // 3
    memory = f"{room / 2**20:.0f}MiB"
    code, found = planned(path, "--gpus", "1", "--gpu-memory", memory)
    assert (code, found["fits"]) == (2, False)
    assert found["first_that_does_not_fit"] == "the activations"
    change = found["cheapest_change"]["overrides"]
    assert change == ["micro_batch_size=2", "gradient_accumulation_steps=2"]
    assert found["cheapest_change"]["peak"] + 2**30 <= room
    # what is advised does it, and it is the page of 80 columns that says so
    code, better = planned(path, *change, "--gpus", "1", "--gpu-memory", memory)
    assert (code, better["fits"], better["peak"]) == (0, True, found["cheapest_change"]["peak"])
    assert better["global_batch_size"] == found["global_batch_size"]
    page = arctic_train("plan", str(path), "--gpus", "1", "--gpu-memory", memory, cwd=path.parent)
    assert page.returncode == 2
    assert "first without room: the activations" in page.stdout
    assert "micro_batch_size=2" in page.stdout
    assert max(len(line) for line in page.stdout.splitlines()) <= 80


@pytest.mark.full
def test_suggests_a_recipe_that_fits_where_states_are_too_large(path: Path) -> None:
    """18 bytes a parameter do not fit into a little more than 1 GiB; those of the device do, offloaded."""
    done = arctic_train(
        "plan", str(path), "micro_batch_size=1", "model.disable_activation_checkpoint=false",
        "--gpus", "1", "--gpu-memory", "1.09GiB", "--suggest", cwd=path.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    suggested = yaml.safe_load(done.stdout)
    assert suggested["deepspeed"]["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    suggestion = path.with_name("suggested.yaml")
    suggestion.write_text(done.stdout)
    code, found = planned(suggestion, "--gpus", "1", "--gpu-memory", "1.09GiB")
    assert (code, found["fits"]) == (0, True)
    # master weights, two moments and fp32 gradients are on the host
    assert found["host_peak_per_rank"] >= 16 * found["parameters"]


@pytest.mark.full
def test_ranks_that_share_rows_hold_their_tokens(path: Path) -> None:
    """Half of each of 64 rows is as many tokens as 32 whole rows: activations are alike, but for what
    attention sees whole, with half of the heads, and the copies that are exchanged."""
    _, apart = planned(path, "micro_batch_size=32", "--no-data", "--gpus", "2")
    words = ("sequence_parallel_size=2", "micro_batch_size=64", "--no-data", "--gpus", "2")
    _, shared = planned(path, *words)
    assert shared["global_batch_size"] == apart["global_batch_size"] == 64
    held = [one["peak_by_kind"]["activations"] for one in (shared, apart)]
    assert held[0] == pytest.approx(held[1], rel=0.15)


def test_ranks_that_share_layers_hold_and_send_a_part_of_them(path: Path) -> None:
    """Of two layers with q, k, v, o of 512 x (512, 256, 256, 512) and an MLP of 3 x 512 x 1024 a rank has
    half; embedding, head and five norms it has whole. A layer sums two results in the forward and the
    gradients of five inputs in the backward, 512 bf16 numbers a token each; of two ranks each sends as much
    as it has."""
    words = (LAYERS, "deepspeed.zero_optimization.stage=3", "--no-data", "--gpus", "4")
    _, found = planned(path, *words, "--device", "h100")
    divided = 2 * 512 * (512 + 256 + 256 + 512 + 3 * 1024)
    whole = 2 * 4096 * 512 + 5 * 512
    assert found["parameters"] == found["trained_parameters"] == divided + whole
    kept = found["between_steps"]
    # ZeRO 3 divides the rest between two groups; small weights stay whole
    assert kept["optimizer"] == pytest.approx(12 * (divided / 2 + whole) / 2, rel=0.01)
    assert kept["weights"] == pytest.approx(2 * (divided / 2 + whole) / 2, rel=0.15)
    tokens = found["tokens"] / found["steps"] / 2  # of a group
    sent = found["step_seconds_by_part"]["exchanges"] * DEVICES["h100"].link * LINK_EFFICIENCY
    assert sent == pytest.approx(2 * 7 * 512 * 2 * tokens, abs=100)  # and norms: single numbers
    # four documents of 32 tokens a row; of a token's products a rank does half
    multiplied = divided + 4096 * 512 + 5 * 512
    flops = (6 * multiplied + 12 * 2 * 512 * 32) * tokens / 2
    assert found["model_flops_per_step_and_rank"] == pytest.approx(flops)
    parts = dict(found["step_seconds_by_part"])
    assert found["step_seconds"] == parts.pop("exchanges") + max(parts.values())


@pytest.mark.full
def test_partitions_shrink_with_the_ranks(path: Path) -> None:
    """Between steps ZeRO 3 holds (2 + 4 + 8) bytes a parameter, and its gradients' 4, over the ranks."""
    words = ("--gpus", "8", "deepspeed.zero_optimization.stage=3")
    _, found = planned(path, *words[2:], *words[:2])
    count = found["parameters"]
    kinds = found["between_steps"]
    assert kinds["optimizer"] == pytest.approx(12 * count / 8, rel=0.02)
    assert kinds["weights"] == pytest.approx(2 * count / 8, rel=0.1)  # small ones stay whole
    assert found["trained_parameters"] == count


@pytest.mark.parametrize(("words", "said"), [
    (("--device", "h1000"), "is no device of the table"),
    (("--gpu-memory", "many"), "write 80GiB"),
    (("--ranks", "2", "--gpus", "2"), "is for ranks on the CPU"),
    (("sequence_parallel_size=2", "--gpus", "3"), "is 2, but 3 ranks are planned for"),
    ((LAYERS, "--gpus", "3"), "error: deepspeed.tensor_parallel.autotp_size: is 2, but 3 ranks are"),
    ((LAYERS, "sequence_parallel_size=2", "--gpus", "6"), "is 2 × sequence_parallel_size (2),"),
])  # fmt: skip
def test_refuses_what_it_does_not_know(path: Path, words: tuple[str, ...], said: str) -> None:
    done = arctic_train("plan", str(path), *words, cwd=path.parent)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_terminal_sees_what_is_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    told = Terminal()
    monkeypatch.setattr("sys.stderr", told)
    with _shown(("micro_batch_size=1",)):
        pass
    assert "rehearsing micro_batch_size=1" in told.getvalue()
    monkeypatch.setattr("sys.stderr", io.StringIO())  # a pipe is told nothing
    with _shown(()):
        pass
