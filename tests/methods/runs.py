"""What the tests of whole runs of rewards and of judged answers share: data, divisions, TRL's losses."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.integration.tools import CLOCKS, MODEL, WORDS, lines, recipe, write_recipe

DIVISIONS = {"fine": (0, 1, 1, True), "two": (2, 2, 1, True), "three": (3, 2, 2, False)}
"""Name → ZeRO stage, ranks, micro-batch size, packed; beside a run in one micro-batch on one rank."""
USUAL = ("two", "three")
"""Those that every run of the tests has."""


SCORING = {
    "type": "scoring",
    "config": MODEL,
    "dtype": "fp32",
    "disable_activation_checkpoint": True,
}
TOKEN_SCORING = {**SCORING, "type": "token_scoring"}
WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.8}


def words(draw: random.Random, most: int) -> str:
    """One to `most` words."""
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Jobs:
    """Runs to drive, in one launch for each number of ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.by_ranks: dict[int, list[dict[str, Any]]] = {1: [], 2: []}

    def add(self, name: str, made: dict[str, Any], *, ranks: int = 1, **more: Any) -> None:
        """A run `name` of a recipe."""
        path = write_recipe(self.folder / f"{name}.yaml", made)
        output = more.pop("output_dir", str(self.folder / name))
        self.by_ranks[ranks].append({"recipe": str(path), "output_dir": output, **more})

    def add_divisions(
        self, name: str, made: dict[str, Any], divisions: Sequence[str] = USUAL
    ) -> None:
        """`name-whole` and the same of some `DIVISIONS`."""
        self.add(f"{name}-whole", made)
        for division in divisions:
            stage, ranks, micro, packed = DIVISIONS[division]
            other = json.loads(json.dumps(made)) | {"micro_batch_size": micro}
            other["data"]["pack_samples"] = packed
            other["deepspeed"]["zero_optimization"]["stage"] = stage
            self.add(f"{name}-{division}", other, ranks=ranks)

    def add_resumed(self, name: str, made: dict[str, Any], *, ranks: int) -> None:
        """`name-straight`, and `name-stopped`, which stops after three of six steps and goes on; both with
        dropout."""
        made = json.loads(json.dumps(made))
        made["model"]["config"]["attention_dropout"] = 0.2
        made |= {
            "micro_batch_size": 1, "global_batch_size": 4, "train_iters": 6,
            "checkpoint": [{"type": "deepspeed", "save_every_n_steps": 3}],
        }  # fmt: skip
        self.add(f"{name}-straight", made, ranks=ranks)
        self.add(f"{name}-stopped", {**made, "exit_iteration": 3}, ranks=ranks)
        self.add(f"{name}-resumed", made, ranks=ranks, resume="latest",
                 output_dir=str(self.folder / f"{name}-stopped"))  # fmt: skip

    def drive(self, *, timeout: int = 300) -> None:
        """Run them. timeout: seconds, of each launch."""
        from tests.integration.tools import drive

        for ranks, jobs in self.by_ranks.items():
            if jobs:
                drive(jobs, ranks=ranks, folder=self.folder, timeout=timeout)


def whole(data: Path, **changes: Any) -> dict[str, Any]:
    """A run whose every step has all rows in one micro-batch, so that packing changes no global batch."""
    own = {
        "data__max_length": 96, "data__pack_samples": False, "data__num_proc": 1, "eval_interval": 2,
        "data__eval_sources": [str(data.with_name(f"eval-{data.name}"))],
        "global_batch_size": 64, "micro_batch_size": 64, "train_iters": 4,
        "optimizer__learning_rate": 1e-3,
    }  # fmt: skip
    made = recipe(data, **{**own, **changes})
    del made["gradient_accumulation_steps"]
    return made


def like_trl(data: Path, **changes: Any) -> dict[str, Any]:
    """A run of 20 steps, a micro-batch each, with the optimizer of `trl_losses`."""
    own = {
        "train_iters": 20, "micro_batch_size": 4, "data__pack_samples": False,
        "data__max_length": 96, "data__num_proc": 1, "optimizer__learning_rate": 1e-3,
        "optimizer__weight_decay": 0.0,
        "optimizer__betas": [0.9, 0.999], "scheduler__name": "constant", "scheduler__warmup_ratio": 0,
    }  # fmt: skip
    return recipe(data, **{**own, **changes})


def series(run: Path, *keys: str) -> list[float]:
    """The values of some keys, line by line."""
    return [line[key] for line in lines(run) for key in keys if key in line]


def clockless(run: Path) -> list[dict[str, Any]]:
    """All lines without what a clock says."""
    return [
        {k: v for k, v in line.items() if k not in CLOCKS and not k.endswith("_per_second")}
        for line in lines(run)
    ]


def facts(run: Path) -> dict[str, Any]:
    """What `drive` left of a run: `samples` (of each step) and digests of weights."""
    found: dict[str, Any] = json.loads((run / "facts.json").read_text())
    return found


def samples_of(made: dict[str, Any], folder: Path) -> Any:
    """The training samples of a recipe, prepared or found."""
    from arctic_like import load_recipe
    from arctic_like.registry import build
    from arctic_like.tokenizer.byte import byte_tokenizer
    from arctic_like.world import World

    config = load_recipe(write_recipe(folder / "samples.yaml", made)).config
    factory: Any = build(config.data, "data")
    prepared = factory.build(
        tokenizer=byte_tokenizer(), output_dir=folder, seed=config.seed, world=World(),
        max_positions=MODEL["max_position_embeddings"],
    )  # fmt: skip
    return prepared.train


def initial_model(made: dict[str, Any], folder: Path) -> Any:
    """The model that a run of the recipe begins with, plain: without hooks of ours."""
    from arctic_like import load_recipe
    from arctic_like.registry import build
    from arctic_like.tokenizer.byte import byte_tokenizer
    from arctic_like.world import World

    config = load_recipe(write_recipe(folder / "initial.yaml", made)).config
    factory: Any = build(config.model, "model")
    ours = factory.build(
        tokenizer=byte_tokenizer(), seed=config.seed, world=World(), device="cpu", zero_stage=0,
        ds_config={},
    )  # fmt: skip
    model = factory.for_weights(tokenizer=byte_tokenizer())
    model.load_state_dict(ours.state_dict())
    return model


def trl_losses(
    trl: Any, kind: str, model: Any, rows: list[dict[str, Any]], *, batch: int, steps: int,
    folder: Path, reference: Any = None, **settings: Any,
) -> list[float]:  # fmt: skip
    """The losses of TRL's trainer `kind` (`Reward`, `KTO`) over rows in their order."""
    from datasets import Dataset

    from arctic_like.tokenizer.byte import byte_tokenizer

    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), per_device_train_batch_size=batch, max_steps=steps,
        learning_rate=1e-3, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        max_grad_norm=1.0, optim="adamw_torch", train_sampling_strategy="sequential",
        report_to="none", save_strategy="no", use_cpu=True, bf16=False, fp16=False,
        gradient_checkpointing=False, disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
        **({"ref_model": reference} if reference is not None else {}),
    )  # fmt: skip
    found: list[float] = []
    compute = trainer.compute_loss

    def noted(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        found.append(float(loss.detach()))
        return loss

    trainer.compute_loss = noted
    trainer.train()
    return found


def pairs(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Pairs whose answers differ in length, with a margin."""
    draw = random.Random(seed)
    return [
        {
            "prompt": f"{number} {words(draw, 2)}?", "chosen": words(draw, 6) + " yes",
            "rejected": words(draw, 6), "margin": round(draw.uniform(-0.5, 2), 3),
        }
        for number in range(count)
    ]  # fmt: skip


def solutions(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Solutions of one to four steps; the right ones end in ok."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        labels = [draw.random() < 0.6 for _ in range(draw.randint(1, 4))]
        steps = [words(draw, 3) + (" ok" if right else "") for right in labels]
        rows.append({"prompt": f"{number}?", "completions": steps, "labels": labels})
    return rows


def answers(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Judged answers of different lengths; a wanted one ends in yes."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        wanted = number % 3 > 0
        answer = words(draw, 6) + (" yes" if wanted else "")
        prompt = f"{number} {words(draw, 3)}?"
        rows.append({"prompt": prompt, "completion": answer, "label": wanted})
    return rows


def reward(make: Any, data: Path, **changes: Any) -> dict[str, Any]:
    own = {"type": "reward", "model": SCORING, "data__type": "dpo", "data__margin": True}
    made: dict[str, Any] = make(data, **{**own, **changes})
    return made


def process(make: Any, data: Path, **changes: Any) -> dict[str, Any]:
    own = {"type": "process_reward", "model": TOKEN_SCORING, "data__type": "stepwise"}
    made: dict[str, Any] = make(data, **{**own, **changes})
    return made


def kto(make: Any, data: Path, **changes: Any) -> dict[str, Any]:
    own = {"type": "kto", "data__type": "kto", "beta": 0.5, **WEIGHTS}
    made: dict[str, Any] = make(data, **{**own, **changes})
    return made
