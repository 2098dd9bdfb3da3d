"""Changes of a recipe that make it fit, cheapest first, each rehearsed before it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from arctic_like.engine.ds_config import offload_device, zero_stage
from arctic_like.engine.ds_section import tensor_parallel_size
from arctic_like.errors import RecipeError, RunError
from arctic_like.planning.plan import Machine, Plan
from arctic_like.planning.rehearsal import world_of

CHECKPOINT = "model.activation_checkpointing=full"
TILES = "tiled_mlp_compute=true"
AWAY = "activation_checkpoint_cpu_offload=true"
STAGE = "deepspeed.zero_optimization.stage={}"
CUDA_ONLY = ("fused_adam", "fused_adam_moe")
OFFLOAD = "deepspeed.zero_optimization.{}.device=cpu"


@dataclass(frozen=True)
class Change:
    """Overrides of a recipe, and what they cost."""

    overrides: tuple[str, ...]
    price: str

    def __add__(self, other: Change) -> Change:
        merged = {_key(word): word for word in (*self.overrides, *other.overrides)}
        return Change(tuple(merged.values()), f"{self.price}; {other.price}")

    @property
    def keys(self) -> set[str]:
        """What it overrides."""
        return {_key(word) for word in self.overrides}


Replan = Callable[[tuple[str, ...]], Plan]


def changes(config: Any, machine: Machine) -> Iterator[Change]:
    """What could be done, the cheapest first. None of it changes what is learned but by rounding, and ranks
    that share layers go on to: what cannot be combined with that is left out."""
    micro, layers = config.rows, tensor_parallel_size(config.deepspeed)
    if micro > 1:
        yield smaller(config, _half(config), machine)
        if _half(config) > 1:
            yield smaller(config, 1, machine)
    yield from _activations(config, machine)
    stage = zero_stage(config.deepspeed)
    # an optimizer that is a CUDA kernel does not run on the host
    kernel = ("optimizer.type=cpu_adam",) if config.optimizer.type in CUDA_ONLY else ()
    if machine.ranks > layers:  # ZeRO divides among ranks with the same part of the layers
        for higher in range(max(stage, 1) + 1 if stage else 1, 4):
            price = "weights are gathered in every forward and backward" if higher == 3 else "none"
            yield Change((STAGE.format(higher),), price)
    if layers > 1:
        return
    if machine.on_gpu and offload_device(config.deepspeed, "offload_optimizer") == "none":
        raised = () if stage else (STAGE.format(1),)
        yield Change(
            (*raised, *kernel, OFFLOAD.format("offload_optimizer")),
            "the update runs on the host, whose memory it takes",
        )
    if machine.on_gpu and offload_device(config.deepspeed, "offload_param") == "none":
        yield Change(
            (
                STAGE.format(3),
                *kernel,
                OFFLOAD.format("offload_optimizer"),
                OFFLOAD.format("offload_param"),
            ),
            "weights come from the host in every forward and backward",
        )


def cheapest(config: Any, machine: Machine, replan: Replan) -> tuple[Change, Plan] | None:
    """The first single change that fits, else the first sum of them; None where none does."""
    possible = []
    for change in changes(config, machine):
        plan = _tried(replan, change)
        if plan is None:
            continue
        if plan.fits:
            return change, plan
        possible.append(change)
    together: Change | None = None
    for change in _without_weaker(possible):
        before, together = together, change if together is None else together + change
        if before is None:
            continue  # it was tried alone
        plan = _tried(replan, together)
        if plan is None:
            together = before
        elif plan.fits:
            return together, plan
    return None


def _tried(replan: Replan, change: Change) -> Plan | None:
    """The plan with a change; None where the recipe does not allow it (tiles for a mixture of experts), or
    where it cannot be rehearsed."""
    try:
        return replan(change.overrides)
    except (RecipeError, RunError):
        return None


def _activations(config: Any, machine: Machine) -> Iterator[Change]:
    """Fewer activations, for more computation."""
    how = getattr(config.model, "activation_checkpointing", None)
    if how is None:
        return  # a model of one's own
    off = config.model.disable_activation_checkpoint
    best = {"activation_checkpointing": "full", "disable_activation_checkpoint": False}
    # prefix tuning keeps them whatever the recipe says
    can = not config.model.model_copy(update=best).keeps_activations
    words: tuple[str, ...] = ()
    if can and (off or how != "full"):
        words = (CHECKPOINT, *(["model.disable_activation_checkpoint=false"] if off else []))
        yield Change(words, "one more forward, about a third of the step")
    if not config.tiled_mlp_compute and tensor_parallel_size(config.deepspeed) == 1:
        yield Change((TILES,), "MLPs are computed once more in the backward")
    if machine.on_gpu and can and not config.activation_checkpoint_cpu_offload:
        yield Change((*words, AWAY), "inputs of layers go to the host's memory and back")


def smaller(config: Any, micro: int, machine: Machine) -> Change:
    """A smaller micro-batch at the same global batch."""
    groups = world_of(config, machine.ranks).data_size
    batch = config.resolve_batch(groups)
    words = [f"micro_batch_size={micro}"]
    if config.global_batch_size is None or config.given("gradient_accumulation_steps"):
        rounds = batch.global_batch_size // (micro * groups)
        words.append(f"gradient_accumulation_steps={rounds}")
    return Change(tuple(words), "smaller matrix products")


def _key(override: str) -> str:
    return override.partition("=")[0]


def _half(config: Any) -> int:
    """The largest proper divisor of the micro-batch."""
    micro = config.rows
    return max(size for size in range(1, micro) if micro % size == 0)


def _without_weaker(tried: list[Change]) -> list[Change]:
    """Of changes of the same keys only the last, which does most."""
    return [
        change
        for number, change in enumerate(tried)
        if not any(change.keys == later.keys for later in tried[number + 1 :])
    ]
