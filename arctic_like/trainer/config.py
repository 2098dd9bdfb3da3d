"""What a recipe can say at its top level: the config of every trainer.

Key names and defaults are ArcticTraining's wherever both have the thing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import InitErrorDetails, ValidationError

from arctic_like.config.base import Config, PartConfig, wrong
from arctic_like.config.interval import Interval
from arctic_like.config.values import HumanInt, OneOrMany, RecipePath
from arctic_like.errors import Problem, RecipeError
from arctic_like.registry.choice import Choice

Ranks = Literal["*"] | list[HumanInt]


def _level(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


class LoggerConfig(Config):
    """What is logged, and where."""

    level: Annotated[
        Literal["TRACE", "DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR", "CRITICAL"],
        BeforeValidator(_level),
    ] = "INFO"
    """The least severe messages that are shown."""

    output_dir: RecipePath | None = None
    """Folder of `rank-N.log`; `logs/` inside the run directory unless given."""

    print_output_ranks: Ranks = [0]
    """Ranks that print to the console: a list, or `*` for all."""

    file_output_ranks: Ranks = "*"
    """Ranks that write a log file: a list, or `*` for all."""


class WandbConfig(Config):
    """Short form of the tracker `wandb`."""

    enable: bool = False
    """Send metrics to Weights & Biases."""

    entity: str | None = None
    """The user or team that owns the run."""

    project: str | None = "arctic-training"
    """The project that the run joins."""

    name: str | None = None
    """The run's name; the recipe's unless given."""


_LOWER_IS_BETTER = ("loss", "error", "perplexity", "nll", "mae", "mse", "rmse", "wer", "cer")


class MetricMonitor(Config):
    """The metric that "best" means; a bare string is its `metric`."""

    aliases: ClassVar[dict[str, str]] = {"metric_name": "metric"}

    metric: str = "eval/loss"
    """Name of an evaluation metric, as it stands in `metrics.jsonl`; `eval/` may be left out."""

    mode: Literal["auto", "min", "max"] = "auto"
    """Whether lower or higher is better; `auto` goes by the name: losses and errors are better
    lower, everything else higher."""

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, data: Any) -> Any:
        return {"metric": data} if isinstance(data, str) else data

    def direction(self, name: str = "") -> Literal["min", "max"]:
        """Whether lower or higher is better, of the monitored metric or of any other by its name."""
        if self.mode != "auto" and name in ("", self.metric, f"eval/{self.metric}"):
            return self.mode
        words = re.split(r"[/_\W]+", (name or self.metric).lower())
        return "min" if any(word in _LOWER_IS_BETTER for word in words) else "max"


class LearnerConfig(Config):
    """A further model of a run, with what trains it: a critic, a teacher. Its keys are those of the
    recipe's top level, and mean the same."""

    model: Annotated[PartConfig, Choice("model")] = Field(default_factory=dict)  # type: ignore[assignment]
    """The model."""

    optimizer: Annotated[PartConfig, Choice("optimizer")] = Field(default_factory=dict)  # type: ignore[assignment]
    """The optimizer; unused where `frozen`."""

    scheduler: Annotated[PartConfig, Choice("scheduler")] = Field(default_factory=dict)  # type: ignore[assignment]
    """The learning rate over time; unused where `frozen`."""

    deepspeed: dict[str, Any] | None = None
    """DeepSpeed's own settings; the recipe's top-level ones unless given."""

    frozen: bool = False
    """Never trained: no optimizer, no gradients, not in checkpoints."""


@dataclass(frozen=True)
class Batch:
    """How a global batch is made up, at one world size."""

    gradient_accumulation_steps: int
    """Micro-batches of each rank per step. With a global batch that does not divide evenly, the
    most."""
    global_batch_size: int
    """Samples per optimizer step, over all ranks."""


class TrainerConfig(PartConfig):
    """The whole recipe. A trainer's own config class adds keys to it."""

    not_yet: ClassVar[dict[str, str]] = {
        "expert_parallel_size": "every rank holds all experts; ZeRO stage 3 partitions them",
        "arctic_moe": "the model's own code computes its experts; leave it out",
    }
    no_effect: ClassVar[dict[str, str]] = {
        "skip_validation": "a part that goes with the trainer by derivation is accepted as it is",
    }
    aliases: ClassVar[dict[str, str]] = {
        "eval_frequency": "eval_interval",
        "val_interval": "eval_interval",
        "max_steps": "train_iters",
    }
    example: ClassVar[dict[str, Any]] = {
        "model": {"name_or_path": "Qwen/Qwen3-0.6B"},
        "data": {"sources": ["./train.jsonl"]},
        "checkpoint": [
            {"type": "deepspeed", "save_every_n_steps": 100, "auto_resume": True},
            {"type": "huggingface", "save_end_of_training": True},
        ],
    }

    type: str = "sft"
    """The trainer."""

    code: RecipePath | None = None
    """A Python file that defines trainers or parts; `train.py` beside the recipe if there is
    one."""

    output_dir: RecipePath | None = None
    """The run directory; `runs/<recipe>-<time>` unless given."""

    overwrite: bool = False
    """Start anew where `output_dir` holds a run already."""

    allow_changes: bool = False
    """Resume even though what is trained, or what it is trained on, has changed since the checkpoint."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` is CUDA where there is such a device."""

    deterministic: bool = False
    """Only deterministic algorithms, so that a run repeats bit for bit on CUDA too (slower)."""

    seed: Annotated[HumanInt, Field(ge=0, lt=2**63)] = 42
    """Of initial weights, data order and dropout."""

    model: Annotated[PartConfig, Choice("model")] = Field(default_factory=dict)  # type: ignore[assignment]
    """The model."""

    tokenizer: Annotated[PartConfig, Choice("tokenizer")] = Field(default_factory=dict)  # type: ignore[assignment]
    """The tokenizer; the model's unless given."""

    data: Annotated[PartConfig, Choice("data")] = Field(default_factory=dict)  # type: ignore[assignment]
    """What is trained and evaluated on."""

    optimizer: Annotated[PartConfig, Choice("optimizer")] = Field(default_factory=dict)  # type: ignore[assignment]
    """The optimizer."""

    scheduler: Annotated[PartConfig, Choice("scheduler")] = Field(default_factory=dict)  # type: ignore[assignment]
    """The learning rate over time. It covers exactly the steps that will run."""

    checkpoint: Annotated[list[Annotated[PartConfig, Choice("checkpoint")]], OneOrMany()] = []
    """Checkpoint engines: one map or a list of them."""

    exporters: list[Annotated[PartConfig, Choice("exporter", short="type")]] = []
    """Forms of other programs in which the trained model is written once, into `exports/`."""

    callbacks: list[Annotated[PartConfig, Choice("callback")]] = []
    """What happens beside the training, at its moments."""

    trackers: list[Annotated[PartConfig, Choice("tracker")]] = []
    """Where metrics go, beside the console and `metrics.jsonl`."""

    wandb: WandbConfig = WandbConfig()
    """Short form of `trackers: [{type: wandb}]`."""

    logger: LoggerConfig = LoggerConfig()
    """Logs."""

    deepspeed: dict[str, Any] = {}
    """DeepSpeed's own settings, checked by name and type. Batch sizes and dtypes are filled in."""

    epochs: Annotated[HumanInt, Field(ge=0)] = 1
    """Passes over the training data; `train_iters` wins over it."""

    train_iters: Annotated[HumanInt, Field(ge=0)] = 0
    """Optimizer steps to train; 0 leaves it to `epochs`."""

    min_iterations: Annotated[HumanInt, Field(ge=0)] = 0
    """Train at least so many steps, going through the data again where `epochs` would be fewer."""

    metric_monitor: MetricMonitor = MetricMonitor()
    """The evaluation metric that "best" means to checkpoints, early stopping and plateau schedules."""

    test_at_end: bool = False
    """Measure the test sets (`data.test_sources`) after training."""

    test_only: bool = False
    """Do not train: measure the test sets and end."""

    exit_iteration: Annotated[HumanInt, Field(ge=0)] = 0
    """Stop after this step as if the run were over, with the learning rates of the whole run; 0
    is off."""

    exit_iteration_this_run: Annotated[HumanInt, Field(ge=0)] = 0
    """Stop after so many steps since this start or resume; 0 is off."""

    micro_batch_size: Annotated[HumanInt, Field(ge=1)] | Literal["auto"] = 1
    """Samples of one forward and backward pass on one rank; `auto` tries 1, 2, 4, … before the run and
    takes the fastest that fits. The global batch stays."""

    gradient_accumulation_steps: Annotated[HumanInt, Field(ge=1)] = 1
    """Micro-batches of one rank per optimizer step; derived where `global_batch_size` is given."""

    global_batch_size: Annotated[HumanInt, Field(ge=1)] | None = None
    """Samples per optimizer step over all ranks. Stays the same at any number of ranks."""

    overfit_first_batch: bool = False
    """Train on the first batch again and again: a quick check that a model can learn at all."""

    eval_interval: Interval = Interval()
    """How often to evaluate: `100` (steps), `1 epoch`, `5%`, `10 min`; 0 is off."""

    eval_at_start: bool = False
    """Evaluate before the first step."""

    eval_at_end: bool = False
    """Evaluate after the last step."""

    eval_log_iter_interval: Annotated[HumanInt, Field(ge=0)] = 1
    """Log every n-th evaluation; 0 logs none."""

    loss_log_interval: Interval = Interval.of(1)
    """How often the loss is shown on the console; 0 is off."""

    train_log_iter_interval: Interval = Interval.of(1)
    """How often a train line is written to the metrics; 0 is off."""

    train_log_metrics_path: RecipePath | None = None
    """A further copy of `metrics.jsonl`."""

    kill_switch_path: RecipePath | None = None
    """A file whose appearance stops the run after the step, with a checkpoint."""

    sequence_parallel_size: Annotated[HumanInt, Field(ge=1)] = 1
    """Consecutive ranks that share each row, a part of its tokens each: for rows that are too long for one
    device. `micro_batch_size` is that of a group (docs/long_context.md)."""

    expert_parallel_size: Annotated[HumanInt, Field(ge=1)] = 1
    """Ranks that share a layer's experts."""

    arctic_moe: bool | Literal["auto"] = False
    """Compute experts with ArcticTraining's own layers."""

    tiled_mlp_compute: bool = False
    """Compute MLPs for a piece of the row at a time, and again in the backward pass, to save memory."""

    activation_checkpoint_cpu_offload: bool = False
    """Keep the inputs of checkpointed layers in host memory between forward and backward (CUDA)."""

    mem_profiler: Literal["step", "e2e"] | None = None
    """Record CUDA allocations: short form of `callbacks: [{type: cuda_memory, mode: …}]`."""

    mem_profiler_dir: RecipePath | None = None
    """Folder of the memory snapshots; `mem-prof/` in the logs' folder unless given."""

    mem_profiler_max_entries: Annotated[HumanInt, Field(ge=1)] = 100_000
    """Most entries that the memory profiler keeps; older ones are dropped."""

    skip_validation: bool = False
    """ArcticTraining's switch; accepted without effect."""

    @field_validator("deepspeed", mode="after")
    @classmethod
    def _check_deepspeed(cls, section: dict[str, Any]) -> dict[str, Any]:
        from arctic_like.engine.ds_keys import check_deepspeed

        lines = [
            InitErrorDetails(
                type=wrong(problem.message, hint=problem.hint), loc=tuple(problem.path), input=None
            )
            for problem in check_deepspeed(section)
        ]
        if lines:
            raise ValidationError.from_exception_data("deepspeed", lines)
        return section

    @model_validator(mode="after")
    def _consistent(self) -> TrainerConfig:
        if self.global_batch_size is not None and self.given("gradient_accumulation_steps"):
            product = self.rows * self.gradient_accumulation_steps
            if self.global_batch_size % product:
                raise wrong(
                    f"is {self.global_batch_size}, which is no multiple of micro_batch_size × "
                    f"gradient_accumulation_steps ({self.rows} × "
                    f"{self.gradient_accumulation_steps} = {product})",
                    place="global_batch_size",
                    hint="leave gradient_accumulation_steps out: it is derived",
                )
        resuming = [c.type for c in self.checkpoint if getattr(c, "auto_resume", False)]
        if len(resuming) > 1:
            raise wrong(
                f"has auto_resume in {len(resuming)} entries ({', '.join(resuming)})",
                place="checkpoint",
                hint="one can resume: keep it there",
            )
        if self.wandb.enable and any(tracker.type == "wandb" for tracker in self.trackers):
            raise wrong(
                "is on, and `trackers` names wandb too",
                place="wandb.enable",
                hint="keep one of them",
            )
        return self

    @model_validator(mode="after")
    def _tried(self) -> TrainerConfig:
        from arctic_like.trainer.micro_batch import auto_problems

        for problem in auto_problems(self):
            raise wrong(problem.message, place=problem.place, hint=problem.hint)
        return self

    @model_validator(mode="after")
    def _streams(self) -> TrainerConfig:
        if getattr(self.data, "streaming", False) and not self.train_iters:
            raise wrong(
                "is needed: data.streaming is true, and a stream does not say how long an epoch is",
                place="train_iters",
                hint="say how many optimizer steps to train",
            )
        return self

    @model_validator(mode="after")
    def _packable(self) -> TrainerConfig:
        if getattr(self.data, "pack_samples", False):
            from arctic_like.model.isolation import packing_refusal

            if reason := packing_refusal(self.model):  # type: ignore[arg-type]
                raise wrong(
                    f"is true, but {reason}", place="data.pack_samples", hint="set it to false"
                )
        return self

    @model_validator(mode="after")
    def _shares_rows(self, info: ValidationInfo) -> TrainerConfig:
        if self.sequence_parallel_size > 1:
            from arctic_like.trainer.sequence import sharing_problems

            trainer = ((info.context or {}).get("owners") or (None,))[0]
            for problem in sharing_problems(self, trainer):
                raise wrong(problem.message, place=problem.place, hint=problem.hint)
        return self

    @model_validator(mode="after")
    def _shares_layers(self, info: ValidationInfo) -> TrainerConfig:
        from arctic_like.engine.ds_section import tensor_parallel_size

        if tensor_parallel_size(self.deepspeed) > 1:
            from arctic_like.trainer.tensor_parallel import dividing_problems

            trainer = ((info.context or {}).get("owners") or (None,))[0]
            for problem in dividing_problems(self, trainer):
                raise wrong(problem.message, place=problem.place, hint=problem.hint)
        return self

    @model_validator(mode="after")
    def _measured(self) -> TrainerConfig:
        from arctic_like.trainer.measured import metric_schedules

        if not self.eval_interval and (places := metric_schedules(self)):
            raise wrong(
                "is 'metric', but eval_interval is off: it would never move",
                place=f"{places[0]}.interval",
                hint="state eval_interval, such as `1 epoch`",
            )
        return self

    def resolve_batch(self, world_size: int) -> Batch:
        """How a global batch is made up on `world_size` ranks.

        Raises RecipeError where accumulation and global batch size are both given and disagree
        at this world size.
        """
        return resolve_batch(
            world_size,
            micro_batch_size=self.rows,
            gradient_accumulation_steps=(
                self.gradient_accumulation_steps
                if self.global_batch_size is None or self.given("gradient_accumulation_steps")
                else None
            ),
            global_batch_size=self.global_batch_size,
        )

    @property
    def rows(self) -> int:
        """`micro_batch_size` as a number; 1 where it is `auto` and nothing was tried yet."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size

    @property
    def auto_resume(self) -> bool:
        """Whether a checkpoint engine resumes by itself."""
        return any(getattr(entry, "auto_resume", False) for entry in self.checkpoint)


def resolve_batch(
    world_size: int,
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int | None,
    global_batch_size: int | None,
) -> Batch:
    """Accumulation and global batch size, whichever of them is given, at one world size.

    Global batch = micro-batch × accumulation × ranks. Where the global batch alone is given and
    does not
    divide evenly, the accumulation is rounded up; the last micro-batches of a step are then
    smaller or absent. Raises RecipeError where both are given and disagree.
    """
    per_micro_step = micro_batch_size * world_size
    if global_batch_size is None:
        accumulation = gradient_accumulation_steps or 1
        return Batch(accumulation, per_micro_step * accumulation)
    accumulation = -(-global_batch_size // per_micro_step)
    stated = gradient_accumulation_steps
    if stated is not None and stated * per_micro_step != global_batch_size:
        raise RecipeError(
            Problem(
                f"is {global_batch_size}, but micro_batch_size × gradient_accumulation_steps "
                f"× ranks is {micro_batch_size} × {stated} × {world_size} "
                f"= {stated * per_micro_step}",
                place="global_batch_size",
                hint="leave gradient_accumulation_steps out: it is derived for any number of ranks",
            )
        )
    return Batch(accumulation, global_batch_size)
