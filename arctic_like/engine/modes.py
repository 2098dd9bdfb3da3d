"""The two modes of a schedule-free optimizer under DeepSpeed: weights to train with, weights to use.

Such an optimizer (it has `train()` and `eval()`) trains at one point and is evaluated at another, an
average (Defazio et al. 2024, "The Road Less Scheduled", equations 3 to 5). It switches by changing the
weights that it was given; DeepSpeed gave it copies, from which the model's must follow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from arctic_like.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

    from arctic_like.engine.deepspeed import Engine


class OptimizerModes:
    """Switches an engine's optimizer and its model together; does nothing for all other optimizers.

    Made in the mode for training. Not at ZeRO stage 3, where no optimizer of the kind is right.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        optimizer: Any = engine.base_optimizer
        self._optimizer = optimizer
        self._has_modes = all(
            callable(getattr(optimizer, name, None)) for name in ("train", "eval")
        )
        self._depth = 0
        if self._has_modes:
            optimizer.train()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model has the weights to use; afterwards those it had, to the bit. Collective."""
        if not self._has_modes or self._depth:
            yield
            return
        # the optimizer's own way back rounds: an evaluation would change the training
        kept = [weights.detach().clone() for weights in self._weights()]
        self._depth += 1
        self._optimizer.eval()
        self._follow()
        try:
            yield
        finally:
            self._optimizer.train()
            for weights, value in zip(self._weights(), kept, strict=True):
                weights.data.copy_(value)
            self._follow()
            self._depth -= 1

    def finish(self) -> None:
        """No step follows: the model has the weights to use from now on. Collective."""
        if self._has_modes and not self._depth:
            self._optimizer.eval()
            self._follow()
            self._depth = 1

    def _weights(self) -> list[Tensor]:
        return [weights for group in self._optimizer.param_groups for weights in group["params"]]

    def _follow(self) -> None:
        """Give the model the weights that the optimizer has."""
        wrapper: Any = self._engine.engine.optimizer
        if wrapper is self._optimizer:
            return  # stage 0 in fp32: they are the model's own
        if hasattr(wrapper, "update_lp_params"):  # stages 1 and 2
            wrapper.update_lp_params()
        elif hasattr(wrapper, "fp32_groups"):  # stage 0 in low precision
            for sources, targets in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
                for source, target in zip(sources, targets, strict=True):
                    target.data.copy_(source.data)
        else:
            raise RunError(
                f"{type(self._optimizer).__name__} has train() and eval(), and its weights cannot "
                f"be carried over from DeepSpeed's {type(wrapper).__name__}\n"
                "    take another optimizer, or set deepspeed.zero_optimization.stage to 0, 1 or 2"
            )
