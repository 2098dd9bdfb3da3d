"""An evaluation set through the model: named values, each with its weight, reduced once.

`Trainer.validation_step(batch)` returns the loss alone (a scalar or a `Loss`), or a map of named values:

- a number or scalar tensor: a mean over `weight(batch)`;
- a pair (mean, weight): a mean over something else, such as the rows in which an answer was expected;
- a torchmetrics object, updated by the step: computed over all ranks at the end of the set, and reset.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from arctic_like.errors import RunError
from arctic_like.loss import Loss

if TYPE_CHECKING:
    from arctic_like.data.loader import MicroBatch
    from arctic_like.trainer.base import Trainer

Step = Callable[..., Any]


def evaluate_set(
    trainer: Trainer, batches: Iterator[MicroBatch], step: Step
) -> tuple[dict[str, float], dict[str, Any]]:
    """(numbers, other values) of one set. Collective.

    Other values are what torchmetrics objects computed that is no single number: a confusion
    matrix, say. A stand-in batch (a rank with nothing to do) goes through the model, which ZeRO-3 needs,
    and counts nothing; of ranks that share rows the first counts.
    """
    from arctic_like.metrics.ledger import Ledger, terms_of

    ledger = Ledger(device=trainer.device, host=trainer.session.host)
    objects: dict[str, Any] = {}
    with_index = takes_index(step)
    for index, micro in enumerate(batches):
        batch, trainer.samples = trainer.to_device(micro.data), micro.samples
        counts = trainer.world.counts and not micro.idle
        weight = float(trainer.weight(micro.data)) if counts else 0.0
        trainer.emit("on_evaluate_batch_start", batch)
        with contextlib.nullcontext() if counts else _untouched(trainer, objects):
            returned = step(batch, index) if with_index else step(batch)
        loss, found = as_loss(trainer, returned, weight)
        objects.update(found)
        trainer.emit("on_evaluate_batch_end", batch, loss)
        ledger.add(terms_of(loss, weight, stated=_is_stated(returned)))
    values: dict[str, Any] = dict(ledger.read().values)
    numbers, others = {}, {}
    for name, value in {**values, **_computed(trainer, objects)}.items():
        if isinstance(value, (int, float)):
            numbers[name] = float(value)
        else:
            others[name] = value
    return numbers, others


def takes_index(step: Step) -> bool:
    """Whether a step is written `(batch, batch_idx)`."""
    parameters = [
        p for p in inspect.signature(step).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]  # fmt: skip
    return len(parameters) > 1


def _is_stated(returned: Any) -> bool:
    """Whether the step gave a loss; a map of other metrics need not have one."""
    return not isinstance(returned, Mapping) or "loss" in returned


def as_loss(trainer: Trainer, returned: Any, weight: float) -> tuple[Loss, dict[str, Any]]:
    """What a validation step returned as (a `Loss` with its values, its torchmetrics objects).

    Raises RunError for what is none of the known forms.
    """
    import torch

    if not isinstance(returned, Mapping):
        return trainer.checked_loss(returned, weight), {}
    values: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    objects: dict[str, Any] = {}
    for name, value in returned.items():
        if name == "loss":
            continue
        if is_metric(value):
            objects[name] = value
        elif isinstance(value, tuple) and len(value) == 2:
            mean, over = (torch.as_tensor(part, device=trainer.device) for part in value)
            groups[name] = (mean.detach().double() * over, over)
        elif isinstance(value, (int, float)) or (torch.is_tensor(value) and value.ndim == 0):
            values[name] = value
        else:
            raise RunError(
                f"{type(trainer).__name__}.validation_step returned {type(value).__name__} as "
                f"{name!r}; expected is a number, a scalar tensor, (mean, weight) or a torchmetrics object"
            )
    loss = returned.get("loss")
    found = (
        Loss(torch.zeros((), device=trainer.device))
        if loss is None
        else trainer.checked_loss(loss, weight)
    )
    return (
        Loss(found.mean, found.weight, {**found.values, **values}, {**found.groups, **groups}),
        objects,
    )


def is_metric(value: Any) -> bool:
    """Whether a value is a torchmetrics object (or behaves as one)."""
    return all(callable(getattr(value, name, None)) for name in ("update", "compute", "reset"))


def _metrics_of(trainer: Trainer, objects: Mapping[str, Any]) -> list[Any]:
    own = [value for value in vars(trainer).values() if is_metric(value)]
    known = [*objects.values(), *own, *trainer.val_metrics.values()]
    return list({id(metric): metric for metric in known}.values())


@contextlib.contextmanager
def _untouched(trainer: Trainer, objects: Mapping[str, Any]) -> Iterator[None]:
    """Whatever is updated inside, the metrics are afterwards as they were."""
    import copy

    kept = [(metric, copy.deepcopy(vars(metric))) for metric in _metrics_of(trainer, objects)]
    try:
        yield
    finally:
        for metric, state in kept:
            vars(metric).clear()
            vars(metric).update(state)


def _computed(trainer: Trainer, objects: Mapping[str, Any]) -> dict[str, Any]:
    """Name → value of every metric object over all ranks; they are reset."""
    # all ranks compute the same metrics in the same order, one without a batch too
    values: dict[str, Any] = {}
    metrics = {**trainer.val_metrics, **objects}
    if not metrics:
        return values
    # a step that leaves a metric alone (a test step of its own, say) has no value of it to show
    updated = trainer.session.host.sum(
        [float(getattr(metric, "update_called", True)) for metric in metrics.values()]
    )
    for (name, metric), times in zip(metrics.items(), updated, strict=True):
        if not times:
            continue
        result = metric.compute()
        parts = result.items() if isinstance(result, Mapping) else [("", result)]
        for key, value in parts:
            label = f"{name}/{key}" if key else name
            values[label] = value.item() if getattr(value, "numel", lambda: 0)() == 1 else value
        metric.reset()
    return values
