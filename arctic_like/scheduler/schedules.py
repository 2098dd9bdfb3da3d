"""All schedules of one optimizer: the recipe's, and those of groups with one of their own.

One object that moves each at its time (step, epoch, metric), says the learning rates by group, and
is saved and restored as one.

What a resume restores of the optimizer's groups is what the run itself has moved: learning rates,
momenta that a schedule cycles, counts of schedule-free optimizers. Everything else is what the recipe
states, so that a setting changed on purpose holds. A changed `learning_rate` scales what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arctic_like.errors import Problem, RecipeError, RunError
from arctic_like.registry import build
from arctic_like.run_info import RunInfo, supply
from arctic_like.scheduler.base import SchedulerConfig
from arctic_like.scheduler.refusals import below, check_first_epoch, check_groups, check_interval
from arctic_like.scheduler.view import Group, view_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

DEFAULT = ""
"""The group of all parameters that no pattern matches."""

SCALARS = (int, float, bool, str, type(None))


@dataclass
class Schedule:
    """One scheduler, and whose learning rate it moves."""

    name: str
    """The group's that it belongs to; `DEFAULT` for the recipe's own."""
    config: SchedulerConfig
    scheduler: Any
    measured: bool = False
    """Whether an evaluation had its metric already."""


class Schedules:
    """The schedules of an optimizer.

    optimizer: the plain one, whose groups say in `key` which of the recipe's they belong to (a group
    that says nothing belongs to the default).
    groups: group's name → its own schedule, or None to follow the recipe's; in the recipe's order.
    direction: metric's name → "min" or "max", for schedules that follow one.
    Raises RecipeError for groups that the optimizer does not have, and for schedules' settings.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scheduler: SchedulerConfig,
        *,
        info: RunInfo,
        groups: Mapping[str, SchedulerConfig | None] | None = None,
        key: str = "group_name",
        monitored: str = "eval/loss",
        direction: Callable[[str], str] = lambda _: "min",
    ) -> None:
        groups = groups or {}
        self.optimizer = optimizer
        self._key = key
        self._monitored = monitored
        have = {group.get(key, DEFAULT) for group in optimizer.param_groups}
        self.names = [name for name in (DEFAULT, *groups) if name in have]
        check_groups(optimizer, groups, have)
        self._stated_rates = [float(group["lr"]) for group in optimizer.param_groups]
        own = {name for name, config in groups.items() if config is not None}
        self.schedules: list[Schedule] = []
        if have - own:
            view = view_of(optimizer, lambda group: group.get(key, DEFAULT) not in own)
            self._add(DEFAULT, scheduler, view, info, direction)
        for number, (name, config) in enumerate(groups.items()):
            if config is not None:
                view = view_of(optimizer, _is_named(key, name))
                try:
                    self._add(name, config, view, info, direction)
                except RecipeError as error:
                    raise below(error, f"optimizer.groups.{number}.") from error
        self._start = [_scalars(group) for group in optimizer.param_groups]

    def _add(
        self,
        name: str,
        config: SchedulerConfig,
        view: Optimizer,
        info: RunInfo,
        direction: Callable[[str], str],
    ) -> None:
        lengths = config.lengths(
            total_steps=info.training_horizon or 1, steps_per_epoch=info.steps_per_epoch
        )
        stated = [float(group["lr"]) for group in view.param_groups]
        part = build(config, "scheduler")
        scheduler = supply(
            part.build,
            info,
            optimizer=view,
            total_steps=lengths.total,
            warmup_steps=lengths.warmup,
            steps_per_epoch=lengths.steps_per_epoch,
            epochs=lengths.epochs,
            mode=direction(config.metric or self._monitored),
        )
        check_interval(config, scheduler)
        rates = [float(group["lr"]) for group in view.param_groups]
        check_first_epoch(config, stated=stated, rates=rates)
        self.schedules.append(Schedule(name, config, scheduler))

    # What it says ---------------------------------------------------------------------------------

    def learning_rates(self) -> dict[str, float]:
        """`learning_rate` of the default group (the first one where all parameters are in groups of
        the recipe), and `learning_rate/<name>` of the others: those that the next step uses."""
        rates: dict[str, float] = {}
        for group in self.optimizer.param_groups:
            name = group.get(self._key, DEFAULT)
            rates.setdefault(
                f"learning_rate/{name}" if name else "learning_rate", float(group["lr"])
            )
        rates.setdefault("learning_rate", float(self.optimizer.param_groups[0]["lr"]))
        return {key: rates[key] for key in sorted(rates, key=lambda key: key != "learning_rate")}

    def get_last_lr(self) -> list[float]:
        """The learning rate of each of the optimizer's groups, as torch's schedulers give it."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    @property
    def follows_a_metric(self) -> bool:
        """Whether any of them waits for evaluations."""
        return any(schedule.config.interval == "metric" for schedule in self.schedules)

    # When they move -------------------------------------------------------------------------------

    def step(self) -> None:
        """After an optimizer step: move those that go by steps."""
        for schedule in self.schedules:
            if schedule.config.interval == "step":
                schedule.scheduler.step()

    def after_epoch(self) -> None:
        """After an epoch and its evaluation: move those that go by epochs."""
        for schedule in self.schedules:
            if schedule.config.interval == "epoch":
                schedule.scheduler.step()

    def after_evaluation(self, results: Mapping[str, float]) -> None:
        """After an evaluation: move those whose metric it has; the same `results` on all ranks.

        Raises RunError where the first evaluation lacks the metric; a later one may.
        """
        for schedule in self.schedules:
            if schedule.config.interval != "metric":
                continue
            metric = schedule.config.metric or self._monitored
            value = results.get(metric, results.get(f"eval/{metric}"))
            if value is not None:
                schedule.scheduler.step(value)
                schedule.measured = True
            elif not schedule.measured:
                raise RunError(
                    f"the schedule {schedule.config.type} follows {metric!r}, but the evaluation "
                    f"measured {', '.join(results) or 'nothing'}\n"
                    "    name one of these in scheduler.metric or metric_monitor"
                )

    # What is saved --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values: every schedule's state, and what the run has moved in the groups."""
        moved = [
            {key: value for key, value in _scalars(group).items() if value != start.get(key, ...)}
            for group, start in zip(self.optimizer.param_groups, self._start, strict=True)
        ]
        return {
            "schedules": {
                schedule.name: {
                    "class": _class_name(schedule.scheduler),
                    "interval": schedule.config.interval,
                    "measured": schedule.measured,
                    "state": schedule.scheduler.state_dict(),
                }
                for schedule in self.schedules
            },
            "moved": moved,
            "stated_rates": self._stated_rates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, after the optimizer's own state was loaded.

        Raises RecipeError where a schedule is not what it was.
        """
        self._check_same(state["schedules"])
        # first: DeepSpeed (0.19.8) gives all groups what the first had, names too, when it loads a
        # universal checkpoint at stage 3
        for group, start in zip(self.optimizer.param_groups, self._start, strict=True):
            group.update(start)
        for schedule in self.schedules:
            saved = state["schedules"][schedule.name]
            schedule.scheduler.load_state_dict(saved["state"])
            schedule.measured = saved["measured"]
        for group, moved in zip(self.optimizer.param_groups, state["moved"], strict=True):
            group.update(moved)
        self._rescale(state["stated_rates"], state["moved"])

    def _check_same(self, saved: Mapping[str, Any]) -> None:
        problems = []
        for schedule in self.schedules:
            have = saved.get(schedule.name, {})
            was = (have.get("class", "none"), have.get("interval", ""))
            now = (_class_name(schedule.scheduler), schedule.config.interval)
            if was != now:
                number = self.names.index(schedule.name) - (DEFAULT in self.names)
                prefix = f"optimizer.groups.{number}." if schedule.name else ""
                problems.append(
                    Problem(
                        f"was {was[0]} by {was[1]} when the checkpoint was saved and is {now[0]} by "
                        f"{now[1]} now: it has no state to go on from",
                        f"{prefix}scheduler.type",
                        "put it back, or start a new run from an export",
                    )
                )
        if problems:
            raise RecipeError(problems)

    def _rescale(self, saved_rates: list[float], moved: list[dict[str, Any]]) -> None:
        """Where the recipe's learning rate changed since the checkpoint, scale what follows."""
        groups = self.optimizer.param_groups
        ratios = {
            id(group): now / was
            for group, was, now in zip(groups, saved_rates, self._stated_rates, strict=True)
            if was and was != now
        }
        for group, its in zip(groups, moved, strict=True):
            if "lr" in its and id(group) in ratios:  # one that did not move is the recipe's already
                group["lr"] = group["lr"] * ratios[id(group)]
        for schedule in self.schedules if ratios else ():
            mine = [
                ratios.get(id(group), 1.0) for group in schedule.scheduler.optimizer.param_groups
            ]
            for name in ("base_lrs", "_last_lr", "_init_lrs"):
                rates = getattr(schedule.scheduler, name, None)
                if isinstance(rates, list) and len(rates) == len(mine):
                    scaled = [rate * ratio for rate, ratio in zip(rates, mine, strict=True)]
                    setattr(schedule.scheduler, name, scaled)


def _is_named(key: str, name: str) -> Callable[[Group], bool]:
    return lambda group: group.get(key, DEFAULT) == name


def _scalars(group: Group) -> dict[str, Any]:
    """The plain values of a parameter group."""
    found = {}
    for key, value in group.items():
        plain = isinstance(value, SCALARS) or (
            key != "params"
            and isinstance(value, tuple | list)
            and all(isinstance(v, SCALARS) for v in value)
        )
        if plain:
            found[key] = value
    return found


def _class_name(scheduler: Any) -> str:
    return type(scheduler).__qualname__
