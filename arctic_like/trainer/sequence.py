"""Where ranks share rows (`sequence_parallel_size`): what a recipe may say with it, and the models' part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from arctic_like.errors import Problem
from arctic_like.registry import lookup
from arctic_like.sequence.group import SequenceGroup

if TYPE_CHECKING:
    from torch import nn

COMPUTES = (
    "loss", "training_step", "validation_step", "test_step", "weight", "to_device", "logits",
    "model_inputs", "inputs_of", "targets", "of_rows", "answer_sums", "reference_sums", "represent",
    "facts_of", "step", "update",
)  # fmt: skip
"""What sees rows: a trainer that overrides one of these says anew that it shares them."""


def shares_sequences(trainer: type) -> bool:
    """Whether a trainer says of its own methods, not only of those it inherits, that it shares rows."""
    for kind in trainer.__mro__:
        if "shares_sequences" in vars(kind):
            return bool(vars(kind)["shares_sequences"])
        if any(name in vars(kind) for name in COMPUTES):
            return False
    return False


def sharing_problems(config: Any, trainer: type | None) -> Iterator[Problem]:
    """What of a recipe cannot be combined with `sequence_parallel_size`.

    trainer: the recipe's; None where it is not known.
    """
    from arctic_like.model.sequence import sharing_refusal

    size, key = config.sequence_parallel_size, "sequence_parallel_size"
    if trainer is not None and not shares_sequences(trainer):
        yield Problem(
            f"is {size}, but trainer {config.type!r} wants whole rows on every rank", key,
            "leave it out; a trainer of one's own says `shares_sequences = True` (docs/long_context.md)",
        )  # fmt: skip
    for place, model in _models(config):
        if not getattr(lookup("model", model.type), "shares_sequences", False):
            yield Problem(
                f"is {model.type!r}, whose models want whole rows, but {key} is {size}",
                f"{place}.type", f"leave {key} out",
            )  # fmt: skip
        elif refusal := sharing_refusal(model, size):
            message, part, way_out = refusal
            where = f"{place}.{part}" if part else place
            yield Problem(f"{message}, but {key} is {size}", where, way_out)
    for number, callback in enumerate(config.callbacks):
        if getattr(lookup("callback", callback.type), "needs_whole_rows", False):
            yield Problem(
                f"needs whole rows on every rank, but {key} is {size}",
                f"callbacks.{number}", f"leave it out, or {key}",
            )  # fmt: skip


def _models(config: Any) -> Iterator[tuple[str, Any]]:
    """(place, config) of every model that a recipe names."""
    from arctic_like.model.base import ModelConfig
    from arctic_like.trainer.config import LearnerConfig

    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, ModelConfig):
            yield name, value
        elif isinstance(value, LearnerConfig):
            yield f"{name}.model", value.model


def share_rows(module: nn.Module, group: SequenceGroup) -> None:
    """Before the engine: a model of transformers gets attention that the group shares. Others have their own
    (`arctic_like.sequence.ulysses`). Raises RecipeError."""
    if group.size > 1 and hasattr(module, "config"):
        from arctic_like.model.sequence import share_attention

        share_attention(module, group)


def prove_sharing(module: nn.Module, group: SequenceGroup, *, device: str) -> None:
    """After the engine: run the model both ways (`model.sequence.check_sharing`). Collective."""
    vocab_size = getattr(getattr(module, "config", None), "vocab_size", None)
    if group.size > 1 and vocab_size:
        from arctic_like.model.sequence import check_sharing

        check_sharing(module, group, vocab_size=int(vocab_size), device=device)
