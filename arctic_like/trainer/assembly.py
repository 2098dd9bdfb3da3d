"""What a trainer is equipped with, built part by part in a visible order.

    tokenizer → data → steps → model → optimizer → engine → scheduler → generators

Parts receive values by the names of their parameters (`run_info.supply`), never the trainer.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from arctic_like.callbacks.base import CallbackList
from arctic_like.checkpoint.exporters import Exporter, check_exporters
from arctic_like.errors import Problem, RecipeError
from arctic_like.metrics.ledger import Ledger
from arctic_like.registry import build
from arctic_like.run_info import RunInfo, supply
from arctic_like.sequence import SequenceGroup
from arctic_like.trainer.config import resolve_batch
from arctic_like.trainer.continuity import (
    check_batch_size,
    check_continuity,
    check_division,
    check_samples,
)
from arctic_like.trainer.learner import Learner
from arctic_like.trainer.measured import check_measured
from arctic_like.trainer.memory import spare_memory
from arctic_like.trainer.preparation import build_data, build_tokenizer
from arctic_like.trainer.sequence import prove_sharing, share_rows
from arctic_like.trainer.startup import StartUp
from arctic_like.trainer.surface import MAIN
from arctic_like.trainer.tensor_parallel import divide_layers
from arctic_like.trainer.transplant import transplant
from arctic_like.world import World

if TYPE_CHECKING:
    from torch import nn

    from arctic_like.data.base import PreparedData, SampleSet
    from arctic_like.data.loader import Loader, MicroBatch
    from arctic_like.data.order import Plan
    from arctic_like.engine.host import HostGroup
    from arctic_like.recipe import Recipe
    from arctic_like.rundir import RunDirectory
    from arctic_like.stop import StopRequest
    from arctic_like.trainer.base import Trainer
    from arctic_like.trainer.config import MetricMonitor
    from arctic_like.trainer.recorder import Recorder
    from arctic_like.trainer.saver import Saver


@dataclass
class Session:
    """What a door (worker, Python) gives to a trainer: the world, the run directory, the way to stop."""

    recipe: Recipe
    world: World
    host: HostGroup
    directory: RunDirectory
    stop: StopRequest
    resume: Path | None = None
    """The complete checkpoint that the run goes on from."""
    sequence: SequenceGroup = field(default_factory=SequenceGroup)
    """This rank among those that share its rows."""
    start_up: StartUp = field(default_factory=StartUp)
    """How long each part of the start takes."""
    started: float = field(default_factory=time.monotonic)
    requested: str = ""
    """Why this rank wants to stop; becomes the run's reason once all ranks know."""
    concludes: bool = False
    """Whether that reason is the training's goal rather than an interruption."""
    step_weight: float = 0.0
    """Weight of the current global batch over all ranks."""
    micro_batch: int = 0
    """Which of this rank's micro-batches of the step is under way."""
    rehearsed: Any = None
    """`tokenizer` and `data` that are there already: nothing is trained, the run is planned."""

    def external_stop(self, kill_switch: Path | None) -> str:
        """Whether a signal or the kill-switch file asks to stop (asked on rank zero, once a step)."""
        signal_number = self.stop.requested()
        if signal_number:
            return "terminate" if signal_number == 15 else "interrupt"
        return "kill_switch" if kill_switch is not None and kill_switch.exists() else ""


@dataclass
class Equipment:
    """Everything that `assemble` made."""

    info: RunInfo
    tokenizer: Any
    data: PreparedData
    plan: Plan
    loader: Loader
    total_steps: int
    warmup_steps: int
    learners: dict[str, Learner]
    step_ledger: Ledger
    epoch_ledger: Ledger
    callbacks: CallbackList
    recorder: Recorder
    saver: Saver
    exporters: list[Exporter] = field(default_factory=list)

    def evaluation_batches(self) -> Iterator[tuple[str, Iterator[MicroBatch]]]:
        """Every evaluation set with this rank's micro-batches of it."""
        return self._batches(self.data.evaluation)

    def test_batches(self) -> Iterator[tuple[str, Iterator[MicroBatch]]]:
        """Every test set with this rank's micro-batches of it."""
        return self._batches(self.data.test)

    def _batches(self, sets: Mapping[str, SampleSet]) -> Iterator[tuple[str, Iterator[MicroBatch]]]:
        from arctic_like.data.loader import evaluation_batches

        for name, samples in sets.items():
            yield name, evaluation_batches(
                samples, self.data.collate, division=self.loader.division,
                rank=self.info.world.data_rank, size=self.info.world.data_size,
                pin_memory=self.loader.pin_memory,
            )  # fmt: skip


def assemble(trainer: Trainer, session: Session) -> Equipment:
    """Build every part of the recipe for this rank. Collective. Raises RecipeError for what cannot be."""
    from arctic_like.trainer.recorder import Recorder
    from arctic_like.trainer.saver import Saver, saved_state

    config, world = trainer.config, session.world
    resumed = saved_state(session.resume) if session.resume else None
    if resumed:
        _say_changes(config, session, resumed)
        check_division(resumed, tensor_parallel_size=world.tensor_parallel_size)
    callbacks = CallbackList(
        [build(c, "callback") for c in callback_configs(config)], is_main=world.is_main
    )
    notice = _Notices(trainer, callbacks, session.start_up)
    info = RunInfo(
        output_dir=session.directory.path, seed=config.seed, world=world, device=world.device,
        epochs=config.epochs, deepspeed=config.deepspeed, **batch_sizes(config, world, resumed),
    )  # fmt: skip

    notice("on_run_start")
    notice("on_setup_start")
    ready = session.rehearsed
    with notice.part("tokenizer"):
        tokenizer = ready.tokenizer if ready else build_tokenizer(config, info)
    with notice.part("data"):
        data = ready.data if ready else prepare_data(config, info, tokenizer, session)
    check_measured(config, sets=len(data.evaluation))
    plan, loader = loader_of(config, info, data, resumed)
    if resumed:
        check_samples(resumed, samples=plan.size, allow=config.allow_changes)
        check_batch_size(resumed, plan)
    total, warmup = horizon(config, plan, data)
    info = replace(
        info, steps_per_epoch=plan.batches_per_epoch, training_horizon=total, warmup_steps=warmup,
        facts=MappingProxyType(dict(data.facts)),
    )  # fmt: skip
    monitor = config.metric_monitor

    def learner(name: str, part: Any, resumed: dict[str, Any] | None = None) -> Learner:
        made = _learner(
            name, part, info, tokenizer=tokenizer, resumed=resumed, notice=notice, monitor=monitor,
            sequence=session.sequence, spare_memory=functools.partial(spare_memory, config),
        )  # fmt: skip
        prove_sharing(made.engine.module, session.sequence, device=world.device)
        _prove_attention(name, part.model, made.engine.module, info)
        return made

    if hasattr(trainer, "on_data_prepared"):  # a model that is asked before there are others
        trainer.on_data_prepared(data, learner)
    learners = {
        name: learner(name, part, resumed) for name, part in learner_configs(config).items()
    }
    exporters = [build(one, "exporter") for one in config.exporters]
    check_exporters(exporters, list(learners))
    if not ready:
        for one in learners.values():
            _prove_isolation(config, one.engine.module, info)
    _start_generators(config, world)
    return Equipment(
        info=info, tokenizer=tokenizer, data=data, plan=plan, loader=loader, total_steps=total,
        warmup_steps=warmup, learners=learners,
        step_ledger=Ledger(device=world.device, host=session.host),
        epoch_ledger=Ledger(device=world.device, host=session.host),
        callbacks=callbacks, recorder=Recorder(session, config, info),
        saver=Saver(session, config, info), exporters=exporters,
    )  # fmt: skip


def callback_configs(config: Any) -> list[Any]:
    """The recipe's callbacks, and `mem_profiler` as the callback that it is short for."""
    from arctic_like.registry import lookup

    configs = list(config.callbacks)
    if config.mem_profiler is not None:
        short: Any = lookup("callback", "cuda_memory").config_type
        configs.append(
            short(type="cuda_memory", mode=config.mem_profiler, output_dir=config.mem_profiler_dir,
                  max_entries=config.mem_profiler_max_entries)
        )  # fmt: skip
    return configs


def prepare_data(config: Any, info: RunInfo, tokenizer: Any, session: Session) -> PreparedData:
    """The recipe's data, tokenised and packed; says what was read. All ranks fail together."""
    from loguru import logger

    error: BaseException | None = None
    data: Any = None
    try:
        data = build_data(config, info, tokenizer)
    except BaseException as problem:
        error = problem
    session.host.raise_together(error)
    if data.report:
        logger.info(data.report)
    return data  # type: ignore[no-any-return]


def _say_changes(config: Any, session: Session, resumed: dict[str, Any]) -> None:
    """Log what the recipe says otherwise than at the checkpoint; RecipeError for what may not differ."""
    from loguru import logger

    for sentence in check_continuity(resumed, session.recipe.resolved, allow=config.allow_changes):
        logger.info(f"changed since the checkpoint: {sentence}")


def batch_sizes(config: Any, world: World, resumed: dict[str, Any] | None) -> dict[str, Any]:
    """Micro-batch, accumulation and global batch. A resumed run keeps its global batch at any world size."""
    batch = config.resolve_batch(world.data_size)
    saved = resumed["global_batch_size"] if resumed else batch.global_batch_size
    stated = config.global_batch_size is not None
    if (
        resumed
        and not stated
        and _groups(resumed) != world.data_size
        and saved != batch.global_batch_size
    ):
        batch = resolve_batch(
            world.data_size, micro_batch_size=config.rows,
            gradient_accumulation_steps=None, global_batch_size=saved,
        )  # fmt: skip
    return {
        "micro_batch_size": config.rows,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "global_batch_size": batch.global_batch_size,
    }


def _groups(saved: Mapping[str, Any]) -> int:
    """How many groups of ranks had rows of their own when a checkpoint was saved."""
    shared = saved.get("sequence_parallel_size", 1) * saved.get("tensor_parallel_size", 1)
    return int(saved["world_size"]) // int(shared)


def loader_of(
    config: Any, info: RunInfo, data: PreparedData, resumed: Mapping[str, Any] | None = None
) -> tuple[Plan, Loader]:
    """The order of the samples, and this rank's way through it. resumed: the `run.json` that the run goes
    on from: what came first stays, also at another global batch size."""
    from arctic_like.data.balance import division_of
    from arctic_like.data.loader import Loader
    from arctic_like.data.longest_first import longest_first
    from arctic_like.data.order import BatchPlan

    # a test-only run goes through no training set, but its loader and plan are looked at
    train = data.train if data.train is not None else next(iter(data.test.values()))
    seed = getattr(config.data, "seed", None)
    size = info.global_batch_size
    plan: Plan = data.plan(size) if data.plan is not None else BatchPlan(
        size=len(train), global_batch_size=size,
        seed=info.seed if seed is None else seed, drop_last=bool(getattr(config.data, "drop_last", False)),
    )  # fmt: skip
    count = resumed.get("longest_first", 0) if resumed else size
    if getattr(config.data, "longest_first", False):
        plan = longest_first(plan, train, count=count)
    loader = Loader(
        train, data.collate, plan, division_of(config.data, info.micro_batch_size),
        rank=info.world.data_rank, size=info.world.data_size,
        num_workers=int(getattr(config.data, "dl_num_workers", 0)),
        pin_memory=info.device.startswith("cuda"),
    )  # fmt: skip
    return plan, loader


def horizon(config: Any, plan: Plan, data: PreparedData) -> tuple[int, int]:
    """Optimizer steps of the run, and those of its warm-up."""
    total = config.train_iters or config.epochs * plan.batches_per_epoch
    total = max(total, config.min_iterations)
    if total < 1 and not config.test_only:
        raise RecipeError(
            Problem("and train_iters are both 0: nothing would be trained", place="epochs",
                    hint="set epochs or train_iters")
        )  # fmt: skip
    warmup = config.scheduler.warmup_in_steps(
        total_steps=total, steps_per_epoch=plan.batches_per_epoch
    )
    return total, warmup


def learner_configs(config: Any) -> dict[str, Any]:
    """Name → what describes a learner: the recipe itself, and every field of it that is a
    `LearnerConfig`, by the field's name, but for those that the config's `built_apart` names. All have
    `model`, `optimizer`, `scheduler`, `deepspeed`."""
    from arctic_like.trainer.config import LearnerConfig

    apart = getattr(config, "built_apart", ())
    own = {name: getattr(config, name) for name in type(config).model_fields if name not in apart}
    return {
        MAIN: config,
        **{n: value for n, value in own.items() if isinstance(value, LearnerConfig)},
    }


def _deepspeed_dictionary(
    part: Any, info: RunInfo, resumed: dict[str, Any] | None, hidden_size: int | None,
    section: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    from loguru import logger

    from arctic_like.checkpoint.deepspeed import needs_conversion
    from arctic_like.engine.ds_config import deepspeed_config, inexact

    dictionary = deepspeed_config(
        section=section, dtype=getattr(part.model, "engine_dtype", part.model.dtype),
        micro_batch_size=info.micro_batch_size,
        gradient_accumulation_steps=info.gradient_accumulation_steps, world_size=info.world.data_size,
        sequence_parallel_size=info.world.sequence_parallel_size,
        hidden_size=hidden_size, on_cpu=info.device == "cpu",
    )  # fmt: skip
    for sentence in inexact(dictionary):
        logger.warning(f"deepspeed.{sentence}" if not sentence.startswith("ZeRO") else sentence)
    if resumed and needs_conversion(resumed, world=info.world, zero_stage=_stage(dictionary)):
        dictionary["checkpoint"] = {**dictionary.get("checkpoint", {}), "load_universal": True}
    return dictionary


def _stage(ds_config: dict[str, Any]) -> int:
    from arctic_like.engine.ds_config import zero_stage

    return zero_stage(ds_config)


def _learner(
    name: str, part: Any, info: RunInfo, *, tokenizer: Any, resumed: dict[str, Any] | None,
    notice: _Notices, monitor: MetricMonitor, sequence: SequenceGroup,
    spare_memory: Callable[..., None],
) -> Learner:  # fmt: skip
    """Model, optimizer, engine and scheduler of one learner. A key of the recipe names each moment:
    `model`, `optimizer`, … of the recipe's own, `critic.model`, … of the others."""
    from loguru import logger

    from arctic_like.engine.deepspeed import Engine
    from arctic_like.engine.ds_config import uses_offload
    from arctic_like.engine.ds_section import tensor_parallel_size
    from arctic_like.engine.modes import OptimizerModes
    from arctic_like.optimizer.groups import GROUP
    from arctic_like.optimizer.limits import check_optimizer, untested
    from arctic_like.scheduler.schedules import Schedules

    prefix = "" if name == MAIN else f"{name}."
    model_part = build(part.model, "model")
    section = part.deepspeed if part.deepspeed is not None else info.deepspeed
    ds_config = _deepspeed_dictionary(part, info, resumed, model_part.facts().hidden_size, section)
    with notice.part(f"{prefix}model"):
        module = supply(
            model_part.build, info, tokenizer=tokenizer, ds_config=ds_config, learner=name,
            zero_stage=_stage(ds_config),
        )  # fmt: skip
        share_rows(module, sequence)
        divide_layers(module, ds_config, frozen=_is_frozen(part), tokens=sequence.size)
    begin = (
        getattr(part.model, "weights_from", None) if resumed is None or _is_frozen(part) else None
    )
    if _is_frozen(part):
        with notice.part(f"{prefix}engine"):
            engine = Engine(module, optimizer=None, config=ds_config)
            transplant(engine, begin)
            return Learner(engine, config=part)
    optimizer_part = build(part.optimizer, "optimizer")
    with notice.part(f"{prefix}optimizer"):
        optimizer = supply(
            optimizer_part.build, info, model=module, offload=uses_offload(ds_config)
        )
        check_optimizer(
            optimizer, zero_stage=_stage(ds_config), divided=tensor_parallel_size(ds_config) > 1
        )
        if sentence := untested(optimizer, zero_stage=_stage(ds_config)):
            logger.warning(sentence)
    with notice.part(f"{prefix}engine"):
        spare_memory(module, zero_stage=_stage(ds_config))
        engine = Engine(module, optimizer=optimizer, config=ds_config)
        transplant(engine, begin)
        engine.engine.train()
        modes = OptimizerModes(engine)
    with notice.part(f"{prefix}scheduler"):
        schedules = Schedules(
            optimizer, part.scheduler, info=info, key=GROUP,
            groups={group.label: group.scheduler for group in part.optimizer.groups},
            monitored=monitor.metric, direction=monitor.direction,
        )  # fmt: skip
    return Learner(engine, optimizer, schedules, part, modes)


def _is_frozen(part: Any) -> bool:
    return bool(getattr(part, "frozen", False))


def _prove_attention(name: str, model_config: Any, module: nn.Module, info: RunInfo) -> None:
    """`varlen` attention gives the logits of sdpa; where it does not, `auto` goes back to sdpa."""
    from arctic_like.model.attention import VARLEN, attention_of, check_varlen, set_attention

    size = getattr(getattr(module, "config", None), "vocab_size", None)
    if attention_of(module) != VARLEN or not size:
        return
    reason = check_varlen(module, vocab_size=int(size), device=info.device)
    if reason is None:
        return
    place = "model.attn_implementation" if name == MAIN else f"{name}.model.attn_implementation"
    if model_config.attn_implementation == VARLEN:
        raise RecipeError(
            Problem(
                f"is {VARLEN!r}, but {reason}", place=place, hint="leave it out, or set it to sdpa"
            )
        )
    from loguru import logger

    set_attention(module, "sdpa")
    logger.warning(f"attention: sdpa after all. With {VARLEN}, {reason}")


def _prove_isolation(config: Any, module: nn.Module, info: RunInfo) -> None:
    if not getattr(config.data, "pack_samples", False) or not hasattr(module, "config"):
        return
    from arctic_like.model.isolation import check_isolation, reads_tokens

    if not reads_tokens(module):  # its rows are not those of the data
        return

    check_isolation(module, vocab_size=int(module.config.vocab_size), device=info.device)  # type: ignore[union-attr, arg-type]


def _start_generators(config: Any, world: World) -> None:
    from arctic_like.engine.random_state import seed_everything

    if config.deterministic:
        import torch

        torch.use_deterministic_algorithms(True)
    seed_everything(config.seed, rank=world.noise_rank)


class _Notices:
    """Emits moments while the equipment that `Trainer.emit` needs is still being built."""

    def __init__(self, trainer: Trainer, callbacks: CallbackList, start_up: StartUp) -> None:
        self._trainer = trainer
        self._callbacks = callbacks
        self.start_up = start_up

    def __call__(self, moment: str, *values: Any) -> None:
        getattr(self._trainer, moment, lambda *_: None)(*values)
        self._callbacks.call(moment, self._trainer, *values)

    def part(self, name: str) -> _PartNotice:
        return _PartNotice(self, name)


@dataclass(frozen=True)
class _PartNotice:
    notices: _Notices
    name: str

    def __enter__(self) -> None:
        self.notices.start_up.lap("rest")
        self.notices("on_part_start", self.name)

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.notices.start_up.lap(self.name)
        if kind is None:
            self.notices("on_part_end", self.name)
