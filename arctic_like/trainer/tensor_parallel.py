"""Where ranks share layers (`deepspeed.tensor_parallel.autotp_size`): what a recipe may say with it, and the
models' part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from arctic_like.engine.ds_rules import division_problems
from arctic_like.engine.ds_section import TENSOR_PARALLEL, tensor_parallel_size, zero_stage
from arctic_like.errors import Problem, RecipeError
from arctic_like.registry import lookup

if TYPE_CHECKING:
    from torch import nn

    from arctic_like.world import World


def dividing_problems(config: Any, trainer: type | None) -> Iterator[Problem]:
    """What of a recipe cannot be combined with layers that ranks share.

    trainer: the recipe's; None where it is not known.
    """
    size = tensor_parallel_size(config.deepspeed)
    hint, said = f"leave it out, or {TENSOR_PARALLEL}", f"{TENSOR_PARALLEL} is {size}"
    if trainer is not None and not getattr(trainer, "divides_models", False):
        yield Problem(
            f"is {size}, but trainer {config.type!r} wants whole layers on every rank",
            TENSOR_PARALLEL, "leave it out; a trainer of one's own says `divides_models = True`",
        )  # fmt: skip
    yield from division_problems(config.deepspeed, dtype=getattr(config.model, "dtype", None))
    for place, model in _models(config):
        yield from _model_problems(place, model, size, config.sequence_parallel_size)
    if getattr(config, "reference_model_deepspeed", None) is not None:
        yield Problem(f"is given, but {said}", "reference_model_deepspeed", hint)
    for name, learner in _learners(config):
        if not learner.frozen or learner.deepspeed is not None:
            what = "has settings of its own" if learner.frozen else "is trained beside the model"
            yield Problem(f"{what}, but {said}", name, hint)
    if config.tiled_mlp_compute:
        yield Problem(f"calls layers in pieces, but {said}", "tiled_mlp_compute", hint)
    if config.exporters:
        yield Problem(
            f"writes a copy of the module, of which a rank has parts, but {said}", "exporters.0",
            "take the checkpoint engine `huggingface`, which puts weights together",
        )  # fmt: skip
    for number, callback in enumerate(config.callbacks):
        if getattr(lookup("callback", callback.type), "needs_whole_layers", False):
            yield Problem(
                f"needs whole layers on every rank, but {said}", f"callbacks.{number}", hint
            )


def grouped(world: World, config: Any, *, but: str, hint: str) -> World:
    """The world with the recipe's groups: those that share rows and those that share layers.

    Raises RecipeError where so many ranks cannot be put into groups; `but` says how many there are.
    """
    layers, tokens = tensor_parallel_size(config.deepspeed), config.sequence_parallel_size
    if world.size % (tokens * layers):
        places = {TENSOR_PARALLEL: layers, "sequence_parallel_size": tokens}
        stated = [place for place, size in places.items() if size > 1]
        together = f" × {stated[1]} ({tokens})" if len(stated) > 1 else ""
        raise RecipeError(Problem(f"is {places[stated[0]]}{together}, but {but}", stated[0], hint))
    return replace(world, sequence_parallel_size=tokens, tensor_parallel_size=layers)


def _model_problems(place: str, model: Any, size: int, tokens: int) -> Iterator[Problem]:
    """tokens: among how many ranks rows are shared, which share a rank's heads once more."""
    from arctic_like.model.tensor_parallel import division_refusal

    said, hint = f"{TENSOR_PARALLEL} is {size}", f"leave it out, or {TENSOR_PARALLEL}"
    if model.type != "huggingface":
        yield Problem(
            f"is {model.type!r}, whose layers AutoTP does not know, but {said}",
            f"{place}.type", "set it to huggingface",
        )  # fmt: skip
    elif refusal := division_refusal(model, size, tokens=tokens):
        message, key = refusal
        yield Problem(f"{message}, but {said}", f"{place}.{key}" if key else place, hint)


def _learners(config: Any) -> Iterator[tuple[str, Any]]:
    """(name, config) of every learner beside the recipe's own."""
    from arctic_like.trainer.config import LearnerConfig

    for name in type(config).model_fields:
        if isinstance(value := getattr(config, name), LearnerConfig):
            yield name, value


def _models(config: Any) -> Iterator[tuple[str, Any]]:
    """(place, config) of every model that is divided: below stage 3 a frozen one is whole on every rank."""
    from arctic_like.model.base import ModelConfig

    yield "model", config.model
    if zero_stage(config.deepspeed) < 3:
        return
    for name, learner in _learners(config):
        yield f"{name}.model", learner.model
    for name in type(config).model_fields:
        if name != "model" and isinstance(value := getattr(config, name), ModelConfig):
            yield name, value


def divide_layers(
    module: nn.Module, ds_config: dict[str, Any], *, frozen: bool, tokens: int = 1
) -> None:
    """Before the engine: tell DeepSpeed which weights of a model its AutoTP divides. Raises RecipeError.

    tokens: among how many ranks rows are shared."""
    size = tensor_parallel_size(ds_config)
    ds_config.pop("tensor_parallel", None)
    if size > 1:
        from arctic_like.model.tensor_parallel import indivisible, layer_specs

        if reason := indivisible(module, size, tokens=tokens):
            raise RecipeError(
                Problem(f"is {size}, but it {reason}", TENSOR_PARALLEL, "leave it out")
            )
        ds_config["tensor_parallel"] = {
            "autotp_size": size,
            "partition_config": layer_specs(frozen=frozen),
        }
