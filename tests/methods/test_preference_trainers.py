"""The trainers of pairs: TRL step by step, autograd of a whole batch, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from arctic_like import load_recipe
from arctic_like.api import execute
from arctic_like.data.balance import Division
from arctic_like.data.collate import PaddingCollate
from arctic_like.engine.host import HostGroup
from arctic_like.errors import RecipeError, RunError
from arctic_like.loss import Loss
from arctic_like.stop import StopRequest
from arctic_like.trainer.base import WeightedBatch
from arctic_like.trainer.coupled import CoupledTrainer
from arctic_like.trainer.reference import ReferenceTable, fingerprint, prepare_table
from arctic_like.world import World
from tests.integration.tools import MODEL, WORDS, recipe, train_lines, write_recipe

STEPS, PAIRS, RATE = 20, 4, 3e-3
BARE = (
    "{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
)
# name → what our recipe says, TRL's trainer, what its config says
METHODS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "sigmoid": ({"type": "dpo", "beta": 0.3}, "dpo", {"beta": 0.3}),
    "mixture": (
        {"type": "dpo", "loss": {"aot": 1.0, "bco_pair": 0.5}, "reward_shift": 0.0, "ld_alpha": 0.5,
         "label_smoothing": 0.1},
        "dpo",
        {"loss_type": ["aot", "bco_pair"], "loss_weights": [1.0, 0.5], "ld_alpha": 0.5,
         "label_smoothing": 0.1},
    ),
    "rpo": (
        {"type": "dpo", "rpo_alpha": 0.2, "f_divergence": "js_divergence"},
        "dpo",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2],
         "f_divergence_type": "js_divergence"},
    ),
    "weighted": (
        {"type": "dpo", "loss": "ipo", "use_weighting": True},
        "dpo", {"loss_type": ["ipo"], "use_weighting": True},
    ),
    "orpo": ({"type": "orpo", "beta": 0.2}, "orpo", {"beta": 0.2}),
    "simpo": (
        {"type": "simpo", "beta": 2.0, "gamma": 1.0},
        "cpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    ),
    "cpo": (
        {"type": "cpo", "beta": 0.2, "nll_weight": 0.7, "label_smoothing": 0.1},
        "cpo", {"loss_type": "sigmoid", "beta": 0.2, "cpo_alpha": 0.7, "label_smoothing": 0.1},
    ),
}  # fmt: skip


def write_pairs(path: Path, *, prompt_words: int) -> list[dict[str, str]]:
    """Rows of plain text, a prompt of so many words or of one letter."""
    draw = random.Random(3)
    rows = []
    for number in range(STEPS * PAIRS):
        one, other = (" ".join(draw.choices(WORDS, k=draw.randint(1, 5))) for _ in range(2))
        prompt = " ".join(draw.choices(WORDS, k=prompt_words)) or "?"
        rows.append({"prompt": prompt, "chosen": f" {one} {number}", "rejected": f" {other}!"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture(scope="module", params=METHODS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, trl: Any) -> Any:
    """(our losses, TRL's) of the first steps of one method."""
    ours, kind, theirs = METHODS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    # TRL's ORPO counts the likelihood of prompts; of one token there is none
    rows = write_pairs(folder / "pairs.jsonl", prompt_words=0 if kind == "orpo" else 2)
    kept: dict[str, Any] = {}

    def keep(trainer: Any) -> None:
        kept["model"], kept["tokenizer"] = copy.deepcopy(trainer.module), trainer.tokenizer
        position, kept["order"] = 0, []
        for _ in range(STEPS):
            batch = trainer.equipment.plan.at(position)
            position = batch.next_position
            kept["order"] += [int(i) for i in batch.samples]

    content = recipe(
        folder / "pairs.jsonl", **ours, data__type="dpo", data__pack_samples=False,
        tokenizer={"type": "byte", "chat_template": BARE}, micro_batch_size=PAIRS, train_iters=STEPS,
        optimizer={"type": "adamw", "learning_rate": RATE, "weight_decay": 0.0},
        scheduler={"type": "huggingface", "name": "constant"},
    )  # fmt: skip
    path = write_recipe(folder / "recipe.yaml", content)
    execute(
        load_recipe(path), output_dir=folder / "run", resume="", stop=StopRequest(), inspect=keep
    )
    found = [line["loss"] for line in train_lines(folder / "run")]
    ordered = [rows[i] for i in kept["order"]]
    return found, trl_losses(
        kind, kept["model"], kept["tokenizer"], ordered, folder=folder, settings=theirs
    )


def trl_losses(
    kind: str, model: Any, tokenizer: Any, rows: list[dict[str, str]], *, folder: Path,
    settings: dict[str, Any],
) -> list[float]:  # fmt: skip
    """The loss of every step of TRL's own trainer, in the order of the rows."""
    import warnings

    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    warnings.simplefilter("ignore")
    if kind == "dpo":
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer
    elif kind == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    else:
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer
    losses: list[float] = []

    class Recorded(Trainer):  # type: ignore[misc, valid-type]
        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            found = super().compute_loss(*arguments, **named)
            losses.append(float(found))
            return found

        def _get_train_sampler(self, *arguments: Any, **named: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    config = Config(
        output_dir=str(folder / "trl"), per_device_train_batch_size=PAIRS, num_train_epochs=1,
        learning_rate=RATE, weight_decay=0.0, lr_scheduler_type="constant", max_grad_norm=1.0,
        optim="adamw_torch", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, disable_dropout=True, **settings,
    )  # fmt: skip
    reference = {"ref_model": copy.deepcopy(model)} if kind == "dpo" else {}
    trainer = Recorded(
        model=model, args=config, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, **reference,
    )  # fmt: skip
    trainer.train()
    return losses


def test_every_step_has_the_loss_that_trl_has(both: tuple[list[float], list[float]]) -> None:
    ours, theirs = both
    assert len(ours) == len(theirs) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] != pytest.approx(ours[0], rel=0.02)


# Losses that couple a batch ------------------------------------------------------------------------


class Contrast(CoupledTrainer):
    """A two-layer model with dropout; the loss is a softmax over the whole batch, with groups."""

    def __init__(self, *, coupling: str = "global_batch") -> None:
        import torch

        super().__init__(SimpleNamespace(metric_monitor=None, coupling=coupling))
        torch.manual_seed(5)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.Dropout(0.3), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        ).double()
        self.forwards = 0
        self.found: list[tuple[Loss, float]] = []
        self.session = SimpleNamespace(world=World(), micro_batch=0, step_weight=0.0)  # type: ignore[assignment]

    def represent(self, batch: Any) -> Any:
        self.forwards += 1
        return self.net(batch["x"])

    def facts_of(self, batch: Any) -> Any:
        return batch["x"][:, :1]

    def coupled_loss(self, rows: Any, facts: Any) -> Loss:
        import torch

        similar = rows @ rows.T + facts * facts.T
        losses = similar.logsumexp(1) - similar.diagonal()
        return Loss(
            losses.mean(), values={"facts": facts.mean()},
            groups={"positive": ((losses.detach() * (facts[:, 0] > 0)).sum(), (facts > 0).sum())},
        ) if torch.is_tensor(losses) else Loss(losses)  # fmt: skip

    def to_device(self, batch: Any) -> Any:
        return batch

    def emit(self, moment: str, *values: Any) -> None:
        pass

    def update(self, learner: str, micro_batches: Any, loss: Any = None) -> None:
        """What the base does, without an engine."""
        for index, micro in enumerate(micro_batches):
            self.session.micro_batch = index
            found = self.checked_loss((loss or self.loss)(micro.data), micro.weight)
            (found.mean * micro.scale).backward()
            self.found.append((found, micro.weight))


def micro_batches(trainer: Contrast, parts: list[Any]) -> list[WeightedBatch]:
    """parts: tensors of rows; the last micro-batch stands in, with weight 0."""
    total = float(sum(len(part) for part in parts))
    trainer.session.step_weight = total
    made = [WeightedBatch({"x": p}, [], float(len(p)), len(p) / total) for p in parts]
    return [*made, WeightedBatch({"x": parts[0][:1]}, [], 0.0, 0.0)]


def test_a_coupled_step_has_the_gradient_of_the_whole_batch() -> None:
    """Float64, dropout on: against autograd of one graph over all micro-batches, which draws the same
    random numbers."""
    import torch

    x = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parts = [x[:4], x[4:5], x[5:]]
    trainer = Contrast()
    torch.manual_seed(11)
    trainer.step(micro_batches(trainer, parts))
    after = torch.rand(1)
    found = [p.grad.clone() for p in trainer.net.parameters()]  # type: ignore[union-attr]
    assert trainer.forwards == 8

    trainer.net.zero_grad()
    torch.manual_seed(11)
    rows = torch.cat([trainer.net(part) for part in parts])
    trainer.net(parts[0][:1])
    whole = trainer.coupled_loss(rows, x[:, :1])
    whole.mean.backward()
    for ours, parameter in zip(found, trainer.net.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(torch.rand(1), after)  # generators go on as after one pass

    # what is logged adds up to that of the whole batch
    total = sum(float(loss.mean.detach()) * weight for loss, weight in trainer.found) / len(x)
    assert total == pytest.approx(float(whole.mean), rel=1e-12)
    sums = [sum(float(loss.groups["positive"][k]) for loss, _ in trainer.found) for k in (0, 1)]
    assert sums[0] == pytest.approx(float(whole.groups["positive"][0]), rel=1e-12)
    assert sums[1] == int(whole.groups["positive"][1])


def test_a_coupled_loss_of_micro_batches_is_another_loss() -> None:
    import torch

    x = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for coupling in ("global_batch", "micro_batch"):
        trainer = Contrast(coupling=coupling)
        trainer.net.eval()
        trainer.step(micro_batches(trainer, [x[:4], x[4:]]))
        gradients.append(trainer.net[0].weight.grad)  # type: ignore[union-attr]
    first, second = gradients
    assert float((first - second).abs().max()) > 1e-3  # type: ignore[operator]


# A reference that is asked once ---------------------------------------------------------------------


class Pairs:
    """Samples of one to three pairs of random tokens, as `data: {type: dpo}` gives them."""

    def __init__(self, count: int, *, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.samples = []
        for _ in range(count):
            lengths = draw.integers(2, 6, 2 * draw.integers(1, 4))
            tokens = draw.integers(0, 50, lengths.sum())
            segments = np.repeat(np.arange(len(lengths)), lengths)
            self.samples.append(
                {
                    "input_ids": tokens,
                    "labels": tokens,
                    "position_ids": tokens,
                    "segment_ids": segments,
                }
            )
        self.lengths = np.array([len(one["input_ids"]) for one in self.samples])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


class Oracle:
    """Gives each answer the sum of its tokens; counts what it is asked, and fails when told to."""

    def __init__(self, *, fails_after: int = 10**9) -> None:
        self.asked, self.fails_after = 0, fails_after

    def __call__(self, batch: Any) -> Any:
        import torch

        if self.asked >= self.fails_after:
            raise KeyboardInterrupt
        self.asked += len(batch["input_ids"])
        found = []
        for tokens, segments in zip(batch["input_ids"], batch["segment_ids"], strict=True):
            found += [float(tokens[segments == k].sum()) for k in range(int(segments.max()) + 1)]
        return torch.tensor(found, dtype=torch.float64)


def tabulated(root: Path, oracle: Oracle, *sets: Pairs, reference: str = "one") -> ReferenceTable:
    return prepare_table(
        sets, PaddingCollate(pad_token_id=0, multiple=8), oracle, reference=reference, root=root,  # type: ignore[arg-type]
        division=Division(3, balance=True), host=HostGroup(World()), chunk=4,
    )  # fmt: skip


def test_a_table_gives_every_batch_its_own_answers(tmp_path: Path) -> None:
    """Whatever the order, the set and the padding."""
    one, other = Pairs(11), Pairs(5, seed=1)
    table = tabulated(tmp_path, Oracle(), one, other)
    for rows in ([one[7]], [one[0], other[4], one[10]], [other[k] for k in (3, 1, 0)]):
        batch = PaddingCollate(pad_token_id=0, multiple=8)(rows)
        assert table.of(batch).tolist() == Oracle()(batch).tolist()


def test_a_table_is_found_again_and_made_anew_for_another_reference(tmp_path: Path) -> None:
    samples = Pairs(11)
    tabulated(tmp_path, Oracle(), samples)
    again, other, more = Oracle(), Oracle(), Oracle()
    tabulated(tmp_path, again, samples)
    tabulated(tmp_path, other, samples, reference="two")
    tabulated(tmp_path, more, samples, Pairs(3, seed=9))
    assert (again.asked, other.asked, more.asked) == (0, 11, 3)


def test_a_table_whose_preparation_was_killed_goes_on(tmp_path: Path) -> None:
    samples = Pairs(11)
    with pytest.raises(KeyboardInterrupt):
        tabulated(tmp_path, Oracle(fails_after=6), samples)
    rest = Oracle()
    table = tabulated(tmp_path, rest, samples)
    assert rest.asked == 7  # one entry of four samples was whole
    batch = PaddingCollate(pad_token_id=0)([samples[k] for k in range(11)])
    assert table.of(batch).tolist() == Oracle()(batch).tolist()


def test_a_sample_that_was_not_there_is_named(tmp_path: Path) -> None:
    table = tabulated(tmp_path, Oracle(), Pairs(4))
    with pytest.raises(RunError, match="precompute_reference"):
        table.of(PaddingCollate(pad_token_id=0)([Pairs(1, seed=5)[0]]))


def test_a_fingerprint_is_of_every_value() -> None:
    import torch

    def made(**changes: Any) -> str:
        torch.manual_seed(0)
        net = torch.nn.Linear(40, 30, bias=changes.get("bias", True))
        with torch.no_grad():
            net.weight[17, 23] += changes.get("shift", 0.0)
        return fingerprint(net.to(changes.get("dtype", torch.float32)), HostGroup(World()))

    assert made() == made()
    others = [made(shift=1e-6), made(bias=False), made(dtype=torch.bfloat16)]
    assert len({made(), *others}) == 4


# What is refused -----------------------------------------------------------------------------------


def preferences(folder: Path, **changes: Any) -> Path:
    row = {"prompt": "ice?", "chosen": "snow", "rejected": "frost"}
    (folder / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    own = {"type": "dpo", "data__type": "dpo", "train_iters": 1}
    return write_recipe(
        folder / "recipe.yaml", recipe(folder / "pairs.jsonl", **{**own, **changes})
    )


ADAPTER = {"config": MODEL, "dtype": "fp32", "peft_config": {"type": "lora", "r": 2}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "sigmod"}, ["loss", "'sigmod'", "did you mean 'sigmoid'"]),
        ({"loss": ["ipo", "ipo"]}, ["loss", "twice"]),
        ({"loss": "orpo"}, ["loss", "'orpo'", "type: orpo"]),
        ({"loss": "hinge", "label_smoothing": 0.1}, ["label_smoothing", "hinge", "sigmoid"]),
        ({"loss": "exo_pair"}, ["label_smoothing", "exo_pair"]),
        ({"loss": "apo_zero", "f_divergence": "js_divergence"}, ["loss", "apo_zero", "reverse_kl"]),
        ({"loss": "aot", "use_weighting": True}, ["loss", "aot", "weights"]),
        ({"reward_shift": 0.5}, ["reward_shift", "bco_pair"]),
        ({"loss": ["sigmoid", "sft"], "rpo_alpha": 0.1}, ["rpo_alpha", "sft"]),
        ({"loss": ["sigmoid", "sft"], "ld_alpha": 0.1}, ["ld_alpha", "sft"]),
        ({"loss": "sft", "ref_model": {"config": MODEL}}, ["ref_model", "leave it out"]),
        ({"reference": {"frozen": False}}, ["reference.frozen", "not trained"]),
        ({"ref_model": {"config": MODEL}, "reference": {}}, ["reference", "ref_model", "both"]),
        ({"reference_model_deepspeed": {"zero_optimisation": {}}}, ["zero_optimization"]),
        ({"type": "cpo", "loss": "hinge", "label_smoothing": 0.1}, ["label_smoothing", "hinge"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_recipe_says_what_is_wrong(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe(preferences(tmp_path, **changes))
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("precompute", [False, True])
def test_vocabularies_that_differ_are_refused(tmp_path: Path, precompute: bool) -> None:
    model = {"config": {**MODEL, "vocab_size": 512}, "dtype": "fp32"}
    own = {"config": {**MODEL, "vocab_size": 300}, "dtype": "fp32"}
    path = preferences(tmp_path, model=own, ref_model=model, precompute_reference=precompute)
    with pytest.raises(RecipeError, match=r"(?s)reference.model: has 512 tokens, the policy 300"):
        execute(load_recipe(path), output_dir=tmp_path / "run", resume="", stop=StopRequest())


def test_which_model_is_the_reference(tmp_path: Path) -> None:
    """The policy's own section; the one stated; none where the adapter is switched off, or nothing is
    compared."""

    def config(**changes: Any) -> Any:
        return load_recipe(preferences(tmp_path, **changes)).config

    plain = config()
    assert plain.reference.model == plain.model
    assert plain.reference.frozen
    stated = config(ref_model={"config": {**MODEL, "num_hidden_layers": 1}})
    assert stated.reference.model.config["num_hidden_layers"] == 1
    divided = config(reference={"deepspeed": {"zero_optimization": {"stage": 3}}})
    assert divided.reference.model == divided.model
    assert divided.reference.deepspeed["zero_optimization"]["stage"] == 3
    short = config(reference_model_deepspeed={"zero_optimization": {"stage": 3}})
    assert short.reference.model == divided.reference.model
    assert short.reference.deepspeed == divided.reference.deepspeed
    assert config(model=ADAPTER).reference is None
    assert config(model=ADAPTER).by_adapter
    assert config(model=ADAPTER, ref_model={"config": MODEL}).reference is not None
    pissa = {**ADAPTER, "peft_config": {**ADAPTER["peft_config"], "init_lora_weights": "pissa"}}  # type: ignore[dict-item]
    assert config(model=pissa).reference.model.peft_config["init_lora_weights"] == "pissa"
    assert config(precompute_reference=True).reference is None
    assert config(loss="sft").reference is None


def test_a_recipe_that_is_written_out_is_the_same(tmp_path: Path) -> None:
    """What was not stated does not stand in it."""
    import yaml

    path = preferences(tmp_path, loss={"sigmoid": 1.0, "sft": 0.5})
    first = load_recipe(path)
    assert "reference" not in yaml.safe_load(first.dump())
    again = tmp_path / "again.yaml"
    again.write_text(first.dump())
    assert load_recipe(again).config == first.config


def test_the_loss_of_a_policy_that_is_its_reference_is_known(tmp_path: Path) -> None:
    """log 2 for DPO, and (1 / 2β)² for IPO, whatever the model."""
    for loss, expected in (("sigmoid", math.log(2)), ("ipo", (1 / (2 * 0.25)) ** 2)):
        path = preferences(tmp_path, loss=loss, beta=0.25)
        run = tmp_path / loss
        execute(load_recipe(path), output_dir=run, resume="", stop=StopRequest())
        assert train_lines(run)[0]["loss"] == pytest.approx(expected, rel=1e-6)
