"""Drafting heads, `recipes/speculator`: against plain torch, on two ranks, after a resume, and as served."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu

from arctic_like import load_recipe
from arctic_like.api import execute
from arctic_like.errors import RecipeError
from arctic_like.registry.named import find_object
from arctic_like.stop import StopRequest
from tests.integration.tools import MODEL, WORDS, lines, recipe, write_conversations, write_recipe
from tests.methods.runs import Jobs, clockless

pytestmark = pytest.mark.full

FOLDER = Path(__file__).parents[2] / "recipes" / "speculator"
BASE = {**MODEL, "hidden_size": 24}
KINDS = {
    "mlp": {"kind": "mlp", "tie_weights": True},
    "untied": {"kind": "mlp", "tie_weights": False},
    "lstm": {"kind": "lstm"},
}
DIVIDED = [("mlp", "three")]
MORE = {"mlp": ["two"], "lstm": ["two", "three"], "untied": ["three"]}
"""Only the full tests look at these."""


def content(data: Path, kind: str, **changes: Any) -> dict[str, Any]:
    """A run of heads for a base of random weights, whose steps have all rows in one micro-batch."""
    own = {
        "model": {"type": "speculator", "config": BASE, "dtype": "fp32", "n_predict": 3,
                  "inner_dim": 16, **KINDS[kind]},
        "data__max_length": 96, "data__pack_samples": False, "data__num_proc": 1, "eval_interval": 2,
        "data__eval_sources": [str(data)], "global_batch_size": 64, "micro_batch_size": 64,
        "optimizer__learning_rate": 1e-3,
    }  # fmt: skip
    made = recipe(data, type="speculator", code=str(FOLDER / "speculator.py"), **{**own, **changes})
    del made["gradient_accumulation_steps"]
    kept = {"config": BASE, "dtype": "fp32", "disable_activation_checkpoint": True}
    made["base"] = {"frozen": True, "model": {"type": "huggingface", **kept}}
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data") / "data.jsonl", count=24)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """<kind>-whole on one rank; the same on two ranks at stage 2, packed, or 3; one that was resumed."""
    jobs = Jobs(tmp_path_factory.mktemp("speculators"))
    for kind, division in DIVIDED:
        jobs.add_divisions(kind, content(data, kind), [division])
    second = {"zero_optimization": {"stage": 2}}
    jobs.add_resumed("again", content(data, "lstm", deepspeed=second), ranks=2)
    jobs.drive()
    return jobs.folder


@pytest.mark.parametrize(("kind", "division"), DIVIDED)
def test_however_a_batch_is_divided_the_heads_are_the_same(
    runs: Path, kind: str, division: str
) -> None:
    same(runs / f"{kind}-whole", runs / f"{kind}-{division}")


@pytest.mark.full
def test_so_are_other_heads_in_other_divisions(data: Path, tmp_path: Path) -> None:
    """And whole heads over a base that is divided at stage 3."""
    jobs = Jobs(tmp_path)
    for kind, divisions in MORE.items():
        jobs.add_divisions(kind, content(data, kind), divisions)
    divided = content(data, "mlp", micro_batch_size=4)
    divided["base"]["deepspeed"] = {"zero_optimization": {"stage": 3}}
    jobs.add("mlp-divided", divided, ranks=2)
    jobs.drive()
    same(tmp_path / "mlp-whole", tmp_path / "mlp-divided")
    for kind, divisions in MORE.items():
        for division in divisions:
            same(tmp_path / f"{kind}-whole", tmp_path / f"{kind}-{division}")


def same(left: Path, right: Path) -> None:
    one, two = clockless(left), clockless(right)
    assert len(one) == len(two) > 5
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - {"epoch", "samples_seen"}:
            assert theirs[key] == pytest.approx(mine[key], rel=2e-4, abs=2e-6), (mine["step"], key)


def test_a_resumed_run_is_the_run_that_was_not_stopped(runs: Path) -> None:
    straight, stopped = (clockless(runs / f"again-{name}") for name in ("straight", "stopped"))
    assert straight == stopped
    facts = [
        json.loads((runs / f"again-{n}/facts.json").read_text()) for n in ("straight", "stopped")
    ]
    assert facts[0]["final"] == facts[1]["final"]


def test_a_checkpoint_has_no_base(runs: Path) -> None:
    folder = runs / "again-straight/checkpoints/step-3/engine"
    (file, *_) = sorted(folder.rglob("*model_states.pt"))
    names = torch.load(file, map_location="cpu", weights_only=False)["module"].keys()
    assert any(name.startswith("forget_proj") for name in names)
    assert not any("layers" in name or "embed_tokens" in name for name in names)


def plain(
    kind: str, weights: dict[str, Tensor], hidden: Tensor, following: list[int]
) -> list[Tensor]:
    """The logits of each head at one place, by the papers' formulas. hidden: (width,); following: the
    tokens behind the place, of which the k-th goes into head k."""
    heads, inner = len(following), weights["head.0.weight"].shape[1]
    keep = 0.5 ** (0.5 / heads)
    factor = math.sqrt((1 - keep**2) * (inner / 2)) / keep

    def layer(name: str, head: int) -> Tensor:
        numbers = [int(key.split(".")[1]) for key in weights if key.startswith(f"{name}.")]
        return weights[f"{name}.{min(head, max(numbers))}.weight"]

    def norm(x: Tensor, name: str = "", head: int = 0) -> Tensor:
        x = x / torch.sqrt((x * x).sum() / len(x) + 1e-6)
        if not name:
            return x
        scale = layer(name, head)
        shift = weights[next(k for k, v in weights.items() if v is scale).replace("weight", "bias")]
        return scale * x + shift

    state, cell, found = norm(hidden) / math.sqrt(2), torch.zeros(inner, dtype=hidden.dtype), []
    for head, token in enumerate(following):
        if kind == "lstm":
            z = factor * layer("forget_emb", 0)[token]
            gates = {
                g: layer(f"{g}_proj", head) @ state + z
                for g in ("forget", "input", "output", "cell")
            }
            candidate = gelu(norm(gates["cell"], "cell_ln")) * torch.sigmoid(gates["input"])
            cell = cell * torch.sigmoid(gates["forget"]) + candidate
            state = gelu(norm(cell, "state_ln")) * torch.sigmoid(gates["output"])
        else:
            x = layer("proj", head) @ state + factor * layer("emb", head)[token]
            state = gelu(norm(x, "ln", head))
        found.append(layer("head", head) @ state)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_loss_gradient_and_acceptance_are_those_of_plain_torch(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, place by place over packed rows; the base is transformers' own, a document at a time."""
    kept: dict[str, Any] = {}

    def look(trainer: Any) -> None:
        samples = trainer.equipment.data.train
        raw = trainer.equipment.data.collate([samples[i] for i in range(len(samples))])
        for one in (trainer.module, trainer.learner("base").engine.module):
            one.double()
        weights = dict(trainer.module.named_parameters())
        for name, weight in weights.items():  # norms begin as identities
            if "ln" in name:
                torch.manual_seed(len(name))
                weight.data += 0.1 * torch.randn_like(weight)
        monkeypatch.setattr(type(trainer), "model", trainer.module)  # without the engine
        loss = trainer.loss(trainer.to_device(raw))
        loss.mean.backward()
        kept["gradients"] = {name: weight.grad.clone() for name, weight in weights.items()}
        kept["weights"] = {n: w.detach().clone().requires_grad_() for n, w in weights.items()}
        trainer.module.eval()
        with torch.no_grad():
            found = trainer.validation_step(trainer.to_device(raw))
        trainer.module.train().zero_grad()
        kept["loss"], kept["weight"] = float(loss.mean), trainer.weight(raw)
        kept["groups"] = {name: tuple(map(float, pair)) for name, pair in found.groups.items()}
        base = trainer.learner("base").engine.module
        starts = (raw["position_ids"] == 0).nonzero().tolist()
        kept["documents"] = []
        for row, start in starts:
            positions = raw["position_ids"][row, start:]
            behind = (positions[1:] == 0).nonzero()
            size = int(behind[0]) + 1 if len(behind) else len(positions)
            ids, labels = (raw[k][row, start : start + size] for k in ("input_ids", "labels"))
            with torch.no_grad():
                out = base(input_ids=ids[None], output_hidden_states=True, use_cache=False)
            kept["documents"].append(
                (ids.tolist(), labels.tolist(), out.hidden_states[-1][0], out.logits[0])
            )
        raise KeyboardInterrupt

    texts = tmp_path / "texts.jsonl"  # all of which is trained, up to a border
    rows = [{"text": " ".join(WORDS[number % 5 : number % 7 + 5])} for number in range(12)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = content(texts, kind, train_iters=1, data__pack_samples=True, data__type="causal")
    path = write_recipe(tmp_path / "recipe.yaml", made)
    with pytest.raises(KeyboardInterrupt):
        execute(
            load_recipe(path),
            output_dir=tmp_path / "run",
            resume="",
            stop=StopRequest(),
            inspect=look,
        )
    sums, counts = [torch.zeros((), dtype=torch.float64) for _ in range(3)], [0] * 3
    right, in_a_row = [0] * 3, []
    for ids, labels, hidden, logits in kept["documents"]:
        for place in range(len(ids) - 2):
            following = ids[place + 1 : place + 4]
            drafts = plain(kind, kept["weights"], hidden[place], [*following, 0, 0][:3])
            hits: list[bool | None] = [None] * 3
            for head, draft in enumerate(drafts):
                there = place + 2 + head
                if there < len(ids) and labels[there] != -100:
                    sums[head] = sums[head] + cross_entropy(draft, torch.tensor(labels[there]))
                    counts[head] += 1
                    hits[head] = int(draft.argmax()) == int(logits[there - 1].argmax())
                    right[head] += bool(hits[head])
            if None not in hits:
                in_a_row.append(hits.index(False) if False in hits else 3)
    assert kept["weight"] == sum(counts)
    loss = sum(sums) / sum(counts)
    assert kept["loss"] == pytest.approx(float(loss), rel=1e-10)
    loss.backward()
    for name, weight in kept["weights"].items():
        assert torch.allclose(kept["gradients"][name], weight.grad, rtol=1e-7, atol=1e-12), name
    for head in range(3):
        mean = float(sums[head]) / counts[head]
        found = kept["groups"][f"loss/head_{head + 1}"]
        assert found[0] / found[1] == pytest.approx(mean, rel=1e-10)
        assert kept["groups"][f"acceptance_{head + 1}"] == (right[head], counts[head])
    assert kept["groups"]["accepted"] == (sum(in_a_row), len(in_a_row))


@pytest.mark.full
def test_the_tiny_recipe_drafts_what_its_base_says(tmp_path: Path) -> None:
    """A third of its steps, over a base of half its own: most first drafts are the base's tokens."""
    base = execute(
        load_recipe(FOLDER.parent / "distill/teacher.yaml", ["train_iters=100", "logger.level=WARNING"]),
        output_dir=tmp_path / "base", resume="", stop=StopRequest(),
    )  # fmt: skip
    execute(
        load_recipe(FOLDER / "tiny.yaml", [f"model.name_or_path={base.exports[0]}", "train_iters=100",
                                           "eval_interval=0", "logger.level=WARNING"]),
        output_dir=tmp_path / "run", resume="", stop=StopRequest(),
    )  # fmt: skip
    first, last = (line for line in lines(tmp_path / "run") if "eval/accepted" in line)
    assert first["eval/accepted"] < 0.1
    assert min(last[f"eval/acceptance_{n}"] for n in (1, 2, 3)) > 0.5
    assert last["eval/accepted"] > 1.2


def test_an_mlp_is_written_as_vllm_reads_it(tmp_path: Path, data: Path) -> None:
    """`mlp_speculator`: its keys in config.json, its names of weights, and no more."""
    from safetensors.torch import load_file

    checkpoint = [{"type": "huggingface", "save_end_of_training": True}]
    made = content(data, "mlp", train_iters=1, checkpoint=checkpoint)
    path = write_recipe(tmp_path / "recipe.yaml", made)
    result = execute(load_recipe(path), output_dir=tmp_path / "run", resume="", stop=StopRequest())
    (export,) = result.exports
    said = json.loads((export / "config.json").read_text())
    wanted = {"architectures": ["MLPSpeculatorPreTrainedModel"], "model_type": "mlp_speculator",
              "emb_dim": 24, "inner_dim": 16, "n_predict": 3, "tie_weights": True,
              "scale_input": True, "vocab_size": 262, "top_k_tokens_per_head": [1, 1, 1]}  # fmt: skip
    assert {key: said[key] for key in wanted} == wanted
    shapes = {name: tuple(w.shape) for name, w in load_file(export / "model.safetensors").items()}
    assert shapes == {
        "emb.0.weight": (262, 16), "head.0.weight": (262, 16), "ln.0.weight": (16,),
        "ln.0.bias": (16,), "proj.0.weight": (16, 24), "proj.1.weight": (16, 16),
    }  # fmt: skip


def test_an_lstm_is_written_with_every_name_that_its_server_takes(
    tmp_path: Path, data: Path
) -> None:
    """Arctic Inference takes the other gates' embeddings out of the file before it looks at them."""
    from safetensors.torch import load_file

    made = content(
        data,
        "lstm",
        train_iters=1,
        checkpoint=[{"type": "huggingface", "save_end_of_training": True}],
    )
    path = write_recipe(tmp_path / "recipe.yaml", made)
    result = execute(load_recipe(path), output_dir=tmp_path / "run", resume="", stop=StopRequest())
    weights = load_file(result.exports[0] / "model.safetensors")
    gates = ("forget", "input", "output", "cell")
    assert weights.keys() == {
        *(f"{g}_emb.0.weight" for g in gates), *(f"{g}_proj.{n}.weight" for g in gates for n in (0, 1)),
        *(f"{ln}.0.{part}" for ln in ("cell_ln", "state_ln") for part in ("weight", "bias")),
        "head.0.weight",
    }  # fmt: skip
    assert all(
        torch.equal(weights[f"{g}_emb.0.weight"], weights["forget_emb.0.weight"]) for g in gates
    )
    said = json.loads((result.exports[0] / "config.json").read_text())
    wanted = {"architectures": ["ArcticLSTMSpeculatorPreTrainedModel"], "method": "sum_lstm",
              "input_hidden_dim": 24, "inner_dim": "16", "emb_dim": "16", "proj_dim": "16",
              "tie_weights": True, "tie_lstm_embs": True}  # fmt: skip
    assert {key: said[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": {"frozen": False, "model": {"type": "huggingface", "config": BASE}}}, "has to be frozen"),
        ({"model": {"type": "speculator", "config": BASE, "kind": "lstm", "tie_weights": False}},
         "always for an lstm"),
        ({"model": {"type": "speculator", "config": BASE, "n_predict": 1}}, "for several heads"),
        ({"model": {"type": "speculator", "config": BASE, "peft_config": {"type": "lora"}}}, "adapter"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    tmp_path: Path, data: Path, changes: dict[str, Any], words: str
) -> None:
    made = {**content(data, "mlp"), **changes}
    with pytest.raises(RecipeError, match=words):
        load_recipe(write_recipe(tmp_path / "recipe.yaml", made))


def test_heads_for_another_base_are_refused(tmp_path: Path, data: Path) -> None:
    made = content(data, "mlp")
    made["base"]["model"]["config"] = MODEL
    path = write_recipe(tmp_path / "recipe.yaml", made)
    with pytest.raises(RecipeError, match=r"base.model: has \(width, tokens\) \(32, "):
        execute(load_recipe(path), output_dir=tmp_path / "run", resume="", stop=StopRequest())


def test_a_batch_goes_to_another_device_once(data: Path, tmp_path: Path) -> None:
    """As on a GPU, where every tensor of the batch is moved by the same method."""
    load_recipe(write_recipe(tmp_path / "recipe.yaml", content(data, "mlp")))
    kind = find_object("SpeculatorTrainer", place="")

    class Elsewhere(kind):  # type: ignore[misc, valid-type]
        name = "test_speculator_elsewhere"
        device = "meta"

        def __init__(self) -> None:
            model = type("M", (), {"n_predict": 2})
            self.config = type("C", (), {"model": model})()

    tokens = torch.arange(6)[None]
    moved = Elsewhere().to_device({"input_ids": tokens, "labels": tokens, "position_ids": tokens})
    assert {value.device.type for value in (moved["targets"], *moved["places"])} == {"meta"}
    assert [len(places) for places in moved["places"]] == [4, 3]


def test_the_file_of_the_recipe_is_short() -> None:
    assert len((FOLDER / "speculator.py").read_text().splitlines()) < 300
    assert yaml.safe_load((FOLDER / "tiny.yaml").read_text())["code"] == "speculator.py"
