"""The Trainer: one loop that is exact at every ZeRO stage (being written)."""

from __future__ import annotations

from typing import Any, ClassVar

from arctic_like.registry import Part


class Trainer(Part, family="trainer"):
    """What a recipe's `type:` names. Subclasses write at least `loss`."""

    data_factory_type: ClassVar[Any] = ()
    model_factory_type: ClassVar[Any] = ()
    tokenizer_factory_type: ClassVar[Any] = ()
    optimizer_factory_type: ClassVar[Any] = ()
    scheduler_factory_type: ClassVar[Any] = ()
    checkpoint_engine_type: ClassVar[Any] = ()
