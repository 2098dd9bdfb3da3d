"""Python's garbage collector: at chosen steps, on all ranks at once, instead of whenever it likes."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from arctic_like.callbacks.base import Callback, CallbackConfig
from arctic_like.config.values import HumanInt

if TYPE_CHECKING:
    from arctic_like.trainer.base import Trainer


class GCControlConfig(CallbackConfig):
    """`type: gc_control`."""

    type: str = "gc_control"

    every_n_steps: HumanInt = Field(default=100, ge=0)
    """Collect after every so many steps; 0 never."""

    generation: Literal[0, 1, 2] = 2
    """How thoroughly: 2 looks at everything that is not frozen."""

    freeze: bool = True
    """Leave all objects that exist when training begins out of every later collection."""


class GCControl(Callback):
    """`type: gc_control`: a collection that one rank happens to make in a step keeps all others waiting.

    Switched off while training, and collected by hand; afterwards it is as it was.
    """

    name = "gc_control"
    config_type = GCControlConfig
    config: GCControlConfig

    def __init__(self, config: GCControlConfig) -> None:
        super().__init__(config)
        self._was_enabled: bool | None = None

    def on_train_start(self, trainer: Trainer) -> None:
        """Collect once, and switch it off."""
        self._was_enabled = gc.isenabled()
        gc.collect()
        if self.config.freeze:
            gc.freeze()
        gc.disable()

    def on_step_end(self, trainer: Trainer) -> None:
        """Collect, at the same step everywhere."""
        every = self.config.every_n_steps
        if every and trainer.global_step % every == 0:
            gc.collect(self.config.generation)

    def on_train_end(self, trainer: Trainer) -> None:
        """As it was."""
        self._put_back()

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """As it was."""
        self._put_back()

    def _put_back(self) -> None:
        was, self._was_enabled = self._was_enabled, None
        if was is None:
            return
        if self.config.freeze:
            gc.unfreeze()
        if was:
            gc.enable()
