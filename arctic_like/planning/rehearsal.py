"""A recipe's own step, done with tensors that have no memory: what it would take is counted, not guessed.

The recipe's trainer, model, optimizer and DeepSpeed run as they do in training, as rank 0 of as many ranks
as there will be, on its most demanding micro-batches. So checkpointing, tiles, dtypes, adapters, offload and
ZeRO's buffers count because they are there. Takes seconds, no GPU, no weights.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from arctic_like.engine.host import HostGroup
from arctic_like.planning.exchanges import Exchanges
from arctic_like.planning.memory import DEVICE, Memory, Peak
from arctic_like.planning.stand_ins import standing_in
from arctic_like.planning.tensors import rehearsing
from arctic_like.world import World

if TYPE_CHECKING:
    from arctic_like.data.base import PreparedData
    from arctic_like.recipe import Recipe

STEPS = 2
"""The first makes the optimizer's states; the second has them all the time. Each has all micro-batches: with
one in the first, DeepSpeed gathers in another order at ZeRO 3, and a plan of KTO came out 6 % lower."""


@dataclass(frozen=True)
class Prepared:
    """What a run knows before it has a model."""

    tokenizer: Any
    data: PreparedData


@dataclass(frozen=True)
class Rehearsal:
    """What a run takes on its fullest rank, in bytes, and what its model is.

    device, host: the most at once, from when the model is there. cost: what a token costs (`throughput`).
    """

    device: Peak
    host: Peak
    parameters: int
    trained: int
    steady: dict[str, int] = field(default_factory=dict)
    """Kind → bytes on the device between steps."""
    cost: Any = None
    tiled: int = 0
    """Parameters of MLPs that compute piece by piece, and so once more in the backward."""
    own: int = 0
    own_trained: int = 0
    """Parameters of which this rank's ZeRO group has weights: all, or its part of those that ranks share."""
    repeated: float = 0.0
    """Parameters that a token is multiplied with on every rank that shares layers: the head and norms."""
    exchanged: float = 0.0
    """Bytes that a rank sends a token to those that share its rows or its layers."""


class Alone(HostGroup):
    """The host group of a rank whose others are imagined to have what it has."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._group = None

    def sum(self, values: Sequence[float]) -> list[float]:
        """As often as there are ranks."""
        return [float(value) * self.world.size for value in values]

    def gather(self, value: Any) -> list[Any]:
        """As often as there are ranks."""
        return [value] * self.world.size

    def from_main(self, value: Any) -> Any:
        """The value."""
        return value

    def barrier(self) -> None:
        """Nobody is waited for."""

    def raise_together(self, error: BaseException | None) -> None:
        """Raise this rank's error."""
        if error is not None:
            raise error


def world_of(config: Any, ranks: int, *, device: str = "cpu") -> World:
    """Rank zero of so many on one machine. Raises RecipeError where they cannot be put into groups."""
    from arctic_like.trainer.tensor_parallel import grouped

    return grouped(
        World(size=ranks, local_size=ranks, device=device), config,
        but=f"{ranks} {'rank is' if ranks == 1 else 'ranks are'} planned for",
        hint="plan for a multiple of it (--gpus)",
    )  # fmt: skip


def rehearse(
    recipe: Recipe, prepared: Prepared, *, ranks: int, on_gpu: bool, micro_batches: Sequence[Any]
) -> Rehearsal:
    """Build everything of the recipe and do steps of these micro-batches (collated, on the host).

    Raises RecipeError as a run would, RunError where an operation has no form without memory.
    """
    from arctic_like.errors import ArcticError, RunError

    try:
        return _rehearsed(recipe, prepared, ranks, on_gpu=on_gpu, micro_batches=micro_batches)
    except (ArcticError, KeyboardInterrupt):
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise RunError(
            f"this recipe cannot be rehearsed without memory: {type(error).__name__}: {reason}"
        ) from error


def _rehearsed(
    recipe: Recipe, prepared: Prepared, ranks: int, *, on_gpu: bool, micro_batches: Sequence[Any]
) -> Rehearsal:
    world = world_of(recipe.config, ranks, device=DEVICE if on_gpu else "cpu")
    memory, exchanges = Memory(on_gpu=on_gpu), Exchanges()
    with standing_in(world), rehearsing(memory, exchanges):
        trainer = _assembled(recipe, prepared, world, memory)
        vocabulary = getattr(getattr(trainer.module, "config", None), "vocab_size", None)
        memory.vocabulary = vocabulary
        label(trainer, memory)
        shared, before = _groups(trainer), 0.0
        for _ in range(STEPS):
            before = exchanges.through(shared)
            with memory.during("step", "activations"):
                _step(trainer, micro_batches, memory)
            label(trainer, memory)
        steady = memory.live("device")
        _capture(trainer, memory)
        from arctic_like.callbacks.throughput import model_cost
        from arctic_like.engine.divided import division_of, whole_shape
        from arctic_like.engine.layout import shape_of

        weights = list(trainer.module.parameters())
        trained = [p for p in weights if p.requires_grad]
        cost = model_cost(trainer.module)
        divided = [p for p in weights if division_of(p)]
        tokens = _tokens(micro_batches)
        return Rehearsal(
            memory.peaks["device"], memory.peaks["host"],
            _count(map(whole_shape, weights)), _count(map(whole_shape, trained)),
            steady, cost, _tiled(trainer.module, micro_batches),
            own=_count(map(shape_of, weights)), own_trained=_count(map(shape_of, trained)),
            repeated=cost.parameters - _count(map(whole_shape, divided)) if cost and divided else 0,
            exchanged=(exchanges.through(shared) - before) / tokens if tokens else 0.0,
        )  # fmt: skip


def _count(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes))


def _groups(trainer: Any) -> list[Any]:
    """Process groups of ranks that share rows or layers."""
    from deepspeed.utils import groups

    found = [trainer.session.sequence.group]
    if trainer.world.tensor_parallel_size > 1:
        found.append(groups.get_tensor_model_parallel_group())
    return [group for group in found if group is not None]


def _tokens(micro_batches: Sequence[Any]) -> float:
    """Of documents in which something is trained."""
    from torch.utils._python_dispatch import _disable_current_modes

    from arctic_like.callbacks.throughput import documents

    with _disable_current_modes():
        return sum(documents(data)[0] for data in micro_batches if isinstance(data, dict))


def _tiled(module: Any, micro_batches: Sequence[Any]) -> int:
    """Parameters of MLPs that the longest row does not pass in one piece."""
    from torch.utils._pytree import tree_leaves

    from arctic_like.model.tiled_mlp import is_tiled

    width = getattr(getattr(module, "config", None), "hidden_size", None)
    lengths = [
        leaf.shape[-1] for leaf in tree_leaves(list(micro_batches)) if getattr(leaf, "ndim", 0) == 2
    ]
    if width is None or max(lengths, default=0) <= width:
        return 0
    return sum(
        int(getattr(p, "ds_numel", p.numel()))
        for part in module.modules()
        if is_tiled(part)
        for p in part.parameters()
    )


def _capture(trainer: Any, memory: Memory) -> None:
    """An asynchronous checkpoint keeps host memory for the rank's state, from the first save on."""
    engines = trainer.config.checkpoint
    if not any(one.enabled and getattr(one, "asynchronous", False) for one in engines):
        return
    memory.hold(state_size(trainer), "checkpoint", place="host" if memory.on_gpu else "device")


def state_size(trainer: Any) -> int:
    """Bytes of what this rank saves: trained weights, its share of them at ZeRO 3, master weights and states.

    At stages 0 to 2 rank zero, the fullest, saves the weights.
    """
    from torch.utils._pytree import tree_leaves

    found: dict[int, int] = {}
    for learner in trainer.learners.values():
        engine = learner.engine
        if engine.base_optimizer is None:
            continue
        tensors = [getattr(p, "ds_tensor", p) for p in engine.trained().values()]
        tensors += [p for group in engine.base_optimizer.param_groups for p in group["params"]]
        tensors += tree_leaves([dict(state) for state in engine.base_optimizer.state.values()])
        for one in tensors:
            if hasattr(one, "untyped_storage"):
                storage = one.untyped_storage()
                found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def _assembled(recipe: Recipe, prepared: Prepared, world: World, memory: Memory) -> Any:
    """The trainer, equipped as `Trainer.setup` does it, without files."""
    from arctic_like.rundir import RunDirectory
    from arctic_like.sequence import SequenceGroup
    from arctic_like.stop import StopRequest
    from arctic_like.trainer.assembly import Session, assemble

    trainer: Any = recipe.trainer(recipe.config)
    nowhere = RunDirectory(Path(tempfile.gettempdir()) / "arctic-plan")
    session = Session(
        recipe, world, Alone(world), nowhere, StopRequest(), sequence=SequenceGroup.of(world),
        rehearsed=prepared,
    )  # fmt: skip
    trainer.session = session
    with _parts_named(trainer, memory):
        trainer.equipment = assemble(trainer, session)
    trainer.configure()
    trainer.emit("on_setup_end")
    for learner in trainer.learners.values():
        _watch(learner.engine, memory)
    return trainer


@contextmanager
def _parts_named(trainer: Any, memory: Memory) -> Iterator[None]:
    """Inside, what a part allocates is called by what the part is."""
    with ExitStack() as stack:
        open_parts: list[ExitStack] = []
        engines: list[str] = []

        def start(name: str) -> None:
            part = name.rpartition(".")[2]
            if part == "engine" and not engines:
                memory.forget_peaks()
                engines.append(name)
            kind = "weights" if part == "model" else "optimizer"
            open_parts.append(stack.enter_context(ExitStack()))
            open_parts[-1].enter_context(memory.during(f"setup: {name}", kind))

        def end(_: str) -> None:
            open_parts.pop().close()

        stack.enter_context(patch.object(trainer, "on_part_start", start))
        stack.enter_context(patch.object(trainer, "on_part_end", end))
        yield


def _watch(engine: Any, memory: Memory) -> None:
    """Name what an engine's steps allocate, and gradients as they come."""
    if engine.base_optimizer is None:
        return
    step, backward = engine.step, engine.backward

    def stepped() -> bool:
        with memory.during("optimizer step", "optimizer"):
            return bool(step())

    def went_back(loss: Any, *, last: bool) -> None:
        with memory.during("backward", "activations"):
            backward(loss, last=last)

    def arrived(parameter: Any) -> None:
        if parameter.grad is not None:
            memory.relabel(parameter.grad, "gradients")

    engine.step, engine.backward = stepped, went_back
    for parameter in engine.trained().values():
        parameter.register_post_accumulate_grad_hook(arrived)


def label(trainer: Any, memory: Memory) -> None:
    """Call what DeepSpeed holds by what it is: weights, gradients, buffers of its communication."""
    for learner in trainer.learners.values():
        engine = learner.engine
        for tensor in _tensors_of(engine.engine.optimizer if engine.base_optimizer else None):
            memory.relabel(*tensor)
        for parameter in (*engine.module.parameters(), *engine.module.buffers()):
            memory.relabel(parameter, "weights")
            if hasattr(parameter, "ds_tensor") and parameter.ds_tensor is not None:
                memory.relabel(parameter.ds_tensor, "weights")
        if engine.base_optimizer is not None:
            for state in engine.base_optimizer.state.values():
                for value in state.values():
                    if hasattr(value, "untyped_storage"):
                        memory.relabel(value, "optimizer")


def _tensors_of(holder: Any) -> Iterator[tuple[Any, str]]:
    """Tensors in the attributes of DeepSpeed's optimizer whose names say what they are."""
    import torch
    from torch.utils._pytree import tree_leaves

    for name, value in vars(holder).items() if holder is not None else ():
        kind = (
            "communication" if any(word in name for word in ("ipg", "bucket", "buffer"))
            else "gradients" if "grad" in name else ""
        )  # fmt: skip
        for leaf in tree_leaves(value) if kind else ():
            if isinstance(leaf, torch.Tensor):
                yield leaf, kind
            buffers = getattr(leaf, "buffer", None)  # a bucket of ZeRO's
            for buffer in buffers if isinstance(buffers, list) else ():
                yield buffer, "communication"


def _step(trainer: Any, micro_batches: Sequence[Any], memory: Memory) -> None:
    """One optimizer step, as the trainer's loop does it."""
    from torch.utils._python_dispatch import _disable_current_modes

    from arctic_like.trainer.base import WeightedBatch

    with _disable_current_modes():
        weights = [float(trainer.weight(data)) for data in micro_batches]
    trainer.session.step_weight = total = max(sum(weights), 1.0) * trainer.world.data_size
    share = trainer.world.data_size / total
    with memory.during("forward", "activations"):
        trainer.emit("on_step_start")
        trainer.step(
            [
                WeightedBatch(data, [0] * rows_of(data), weight, weight * share)
                for data, weight in zip(micro_batches, weights, strict=True)
            ]
        )
    trainer.progress.global_step += 1


def rows_of(data: Any) -> int:
    """Rows of a collated batch."""
    from arctic_like.trainer.losses import rows_of as counted

    return int(counted(data))
