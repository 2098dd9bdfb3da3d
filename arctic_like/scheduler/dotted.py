"""Any schedule by its dotted path: `{type: torch.optim.lr_scheduler.ExponentialLR, gamma: 0.99}`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import ConfigDict, Field, model_validator

from arctic_like.config.base import wrong
from arctic_like.config.values import HumanFloat
from arctic_like.errors import Problem, RecipeError
from arctic_like.registry.dotted import (
    check_arguments,
    import_class,
    is_dotted,
    parameters,
    with_numbers,
)
from arctic_like.scheduler.base import Interval, SchedulerConfig, SchedulerFactory

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

PLACE = "scheduler"


class DottedSchedulerConfig(SchedulerConfig):
    """A schedule by its dotted path. Other keys are arguments of the class."""

    model_config = ConfigDict(extra="allow")
    intervals: ClassVar[tuple[Interval, ...]] = ("step", "epoch", "metric")

    type: str = "module.Class"
    """The class's dotted path, such as `torch.optim.lr_scheduler.StepLR`; imported when the run
    starts."""

    warmup_ratio: HumanFloat = Field(default=0.0, ge=0, le=1)
    """Share of all steps in which the learning rate rises; for a class that takes `warmup_steps`."""

    @model_validator(mode="after")
    def _is_a_path(self) -> Self:
        if not is_dotted(self.type):
            raise wrong(
                f"is {self.type!r}, not a class's dotted path",
                place="type",
                hint="write it as an import would: torch.optim.lr_scheduler.StepLR",
            )
        return self


class DottedSchedulerFactory(SchedulerFactory):
    """Any schedule class by its dotted path, such as `torch.optim.lr_scheduler.StepLR`; other keys
    are its arguments."""

    name = "module.Class"
    config_type = DottedSchedulerConfig
    config: DottedSchedulerConfig

    def build(  # type: ignore[override]
        self,
        *,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int,
        steps_per_epoch: int,
        epochs: int,
        mode: str,
    ) -> LRScheduler:
        """The class over the optimizer.

        Where its signature names `total_steps`, `warmup_steps`, `steps_per_epoch`, `epochs` or
        `mode` and the recipe does not state them, the run's are given. Raises RecipeError naming
        the arguments that it takes, and where it is no scheduler.
        """
        cls = import_class(self.config.type, place=f"{PLACE}.type")
        methods = ("step", "state_dict", "load_state_dict")
        if not all(callable(getattr(cls, method, None)) for method in methods):
            raise RecipeError(
                Problem(
                    f"is {self.config.type!r}, which is no learning-rate scheduler: it has not all "
                    f"of {', '.join(methods)}",
                    f"{PLACE}.type",
                )
            )
        known = parameters(cls)
        first = next(iter(known), "optimizer")
        stated = {k: with_numbers(v) for k, v in (self.config.model_extra or {}).items()}
        run = {
            "total_steps": total_steps,
            "warmup_steps": warmup_steps,
            "steps_per_epoch": steps_per_epoch,
            "epochs": epochs,
            "mode": mode,
        }
        if self.config.interval != "metric":
            del run["mode"]  # CyclicLR has a `mode` that is something else
        if warmup_steps and "warmup_steps" not in known:
            raise RecipeError(
                Problem(
                    f"is given, but {cls.__qualname__} takes no warmup_steps",
                    f"{PLACE}.{'warmup_steps' if self.config.warmup_steps else 'warmup_ratio'}",
                    "remove it, or take a schedule with a warm-up: huggingface, wsd, "
                    "cosine_with_floor",
                )
            )
        arguments = {**{key: run[key] for key in run if key in known}, **stated}
        check_arguments(cls, arguments, place=PLACE, ours=[first])
        try:
            scheduler: LRScheduler = cls(optimizer, **arguments)
        except (TypeError, ValueError, KeyError) as error:
            raise RecipeError(
                Problem(f"{cls.__qualname__} refuses its settings: {_text(error)}", PLACE)
            ) from error
        return scheduler


def _text(error: Exception) -> Any:
    return error.args[0] if error.args else type(error).__name__
