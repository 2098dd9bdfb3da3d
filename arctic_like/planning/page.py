"""A plan as one page of 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from arctic_like.planning.plan import CONTEXT, IN_ORDER, Plan, kinds
from arctic_like.planning.timing import EFFICIENCY

if TYPE_CHECKING:
    from arctic_like.planning.advice import Change

WIDTH = 80


Advise = Callable[[], "tuple[Change, Plan] | None"]


def page(name: str, plan: Plan, advise: Advise) -> Iterator[str]:
    """The lines. advise: finds the cheapest change that makes it fit, with its plan; asked last, and only
    where the recipe does not fit: it takes much longer than the plan."""
    course, found, machine = plan.course, plan.rehearsal, plan.machine
    device = machine.device.name if machine.device else "GPU" if machine.on_gpu else "CPU"
    yield f"{name} on {machine.ranks} × {device}"
    yield ""
    yield _row("parameters", f"{found.parameters:,}", f"{found.trained:,} trained")
    if plan.knows_data:
        yield _row("steps", f"{course.steps:,}", f"{course.steps_per_epoch:,} an epoch")
        yield _row("tokens", f"{course.tokens:,.0f}", f"{course.trained_tokens:,.0f} trained")
    else:
        known = "the data would say" if plan.steps is None else f"{plan.steps:,}"
        yield _row("steps", known, "of the longest samples")
    shape = " × ".join(f"{size:,}" for size in course.shape)
    yield _row("global batch", f"{course.global_batch_size:,}", f"largest rows {shape}")
    yield ""
    yield f"peak of one rank, in {found.device.phase or 'the step'}"
    for words, size in kinds(found.device.kinds):
        yield _row(f"  {words}", _gib(size), f"{size / max(found.device.total, 1):.0%}")
    yield _row("  together", _gib(found.device.total), "")
    if machine.on_gpu:
        yield _row("  CUDA and its libraries", _gib(CONTEXT), "allowed for")
        host = f"{_gib(found.host.total * machine.ranks).strip()} for {machine.ranks}"
        yield _row("host, of one rank", _gib(found.host.total), host)
    yield ""
    yield from _time(plan)
    yield from _verdict(plan, advise)


def _time(plan: Plan) -> Iterator[str]:
    time = plan.time
    if plan.flops:
        yield _row("model FLOPs", f"{plan.flops:.3g}", "a step of one rank")
    if time is None:
        if plan.flops:
            yield "time             name a GPU with --device to predict it"
            yield ""
        return
    yield _row("step", duration(time.total), f"bound by {time.bound_by}")
    if time.exchanges:
        yield _row("  of it between ranks", duration(time.exchanges), "for which layers wait")
    if plan.steps is not None:
        yield _row("whole run", duration(time.total * plan.steps), "steps alone")
    yield f"  from the device's published figures, matrix products at {EFFICIENCY:.0%} of its peak"
    yield ""


def _verdict(plan: Plan, advise: Advise) -> Iterator[str]:
    if plan.machine.memory is None:
        yield "no memory was named: --device or --gpu-memory says whether it fits"
        return
    room = _gib(plan.machine.memory).strip()
    needs = plan.rehearsal.device.total + (CONTEXT if plan.machine.on_gpu else 0)
    if plan.fits:
        yield f"fits into {room}: {_gib(needs).strip()}, {needs / plan.machine.memory:.0%}"
        return
    yield f"does not fit into {room}: {_gib(needs).strip()}"
    yield f"first without room: {plan.first_that_does_not or IN_ORDER['activations']}"
    advice = advise()
    if advice is None:
        yield "nothing that leaves the training as it is makes it fit: take more or larger GPUs,"
        yield "an adapter (model.peft_config), or a smaller data.max_length"
        return
    change, better = advice
    yield "cheapest change that fits:"
    yield from (f"  {word}" for word in change.overrides)
    after = better.rehearsal.device.total + (CONTEXT if plan.machine.on_gpu else 0)
    yield f"  then {_gib(after).strip()}; it costs: {change.price}"


def _row(name: str, value: str, more: str) -> str:
    return f"{name:<38}{value:>15}  {more}".rstrip()


def _gib(size: float) -> str:
    """Bytes in powers of 1024."""
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def duration(seconds: float) -> str:
    """ "12 ms", "3.4 s", "12 min", "5.2 h", "3.1 d"."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"
