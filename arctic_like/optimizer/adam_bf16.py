"""AdamW whose weights and states are bf16, rounded at random so that small updates are not lost.

A bf16 number has 8 bits: an update below 1/512 of a weight rounds to nothing, and a second moment that decays
by 0.1 % a step stands still. Rounded up with the probability of what rounding down would lose, each value is
right in expectation (Gupta et al. 2015, section 3; Zamirai et al. 2020). The arithmetic is float32. Master
weights and two moments take 6 bytes a parameter, where fp32 ones take 12.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

from arctic_like.optimizer.adam import AdamConfig, adam_arguments
from arctic_like.optimizer.base import OptimizerFactory

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

CHUNK = 1 << 22
"""Elements that are float32 at a time."""


class BF16AdamWConfig(AdamConfig):
    """AdamW over bf16 weights and states, rounded at random; needs DeepSpeed's
    `bf16: {bf16_master_weights_and_grads: true, bf16_optimizer_states: true}`."""

    type: str = "adamw_bf16"


class BF16AdamWFactory(OptimizerFactory):
    """AdamW with bf16 weights and states and stochastic rounding, at ZeRO 1 to 3."""

    name = "adamw_bf16"
    config_type = BF16AdamWConfig
    config: BF16AdamWConfig

    def build(self, *, model: nn.Module, device: str, offload: bool, seed: int = 0) -> Optimizer:
        """The optimizer. seed: of the rounding, which depends on it, the step and the place alone."""
        groups, arguments = adam_arguments(self.config, model)
        made: Optimizer = stochastic_adamw()(groups, **arguments, seed=seed)
        return made


def round_stochastically(target: Tensor, values: Tensor, generator: torch.Generator) -> None:
    """Write float32 values into a tensor of the same shape; into a bf16 one rounded up or down at random,
    up with the probability of the share that lies between. `values` is used up.

    Infinities and NaN stay what they are.
    """
    import torch

    if target.dtype != torch.bfloat16:
        target.copy_(values)
        return
    bits = values.view(torch.int32)
    noise = torch.randint(
        0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator
    )
    # bf16 is the upper half of a float32: what carries over from the lower half rounds away from zero.
    bits.add_(noise).bitwise_and_(-(1 << 16))
    target.copy_(bits.view(torch.float32))


@functools.cache
def stochastic_adamw() -> Any:
    """The optimizer's class, made at the first use: torch is not imported before."""
    import torch
    from torch.optim import Optimizer

    class StochasticAdamW(Optimizer):
        """AdamW (Loshchilov and Hutter 2019, algorithm 2); every tensor in its own dtype."""

        def __init__(
            self, params: Any, *, lr: float, betas: tuple[float, float], eps: float,
            weight_decay: float, seed: int,
        ) -> None:  # fmt: skip
            super().__init__(
                params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
            )
            self._seed = seed
            self._generators: dict[torch.device, torch.Generator] = {}

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            """One update of every parameter that has a gradient."""
            if closure is not None:
                raise TypeError("StochasticAdamW takes no closure")
            for number, group in enumerate(self.param_groups):
                for place, parameter in enumerate(group["params"]):
                    if parameter.grad is not None:
                        self._update(parameter, group, key=(number, place))

        def _update(
            self, parameter: Tensor, group: dict[str, Any], *, key: tuple[int, int]
        ) -> None:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
            step = int(state["step"])
            generator = self._generator(parameter, key=(self._seed, step, *key))
            first, second = group["betas"]
            size = group["lr"] / (1 - first**step)
            root = math.sqrt(1 - second**step)
            assert parameter.grad is not None
            tensors = parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]
            chunk = CHUNK if all(t.is_contiguous() for t in tensors) else 0
            pieces = (_pieces(tensor, chunk) for tensor in tensors)
            for weight, gradient, mean, square in zip(*pieces, strict=True):
                g, w, m, v = (
                    t.to(torch.float32, copy=True) for t in (gradient, weight, mean, square)
                )
                m.lerp_(g, 1 - first)
                v.mul_(second).addcmul_(g, g, value=1 - second)
                w.mul_(1 - group["lr"] * group["weight_decay"])
                w.addcdiv_(m, v.sqrt().div_(root).add_(group["eps"]), value=-size)
                for target, values in ((weight, w), (mean, m), (square, v)):
                    round_stochastically(target, values, generator)

        def _generator(self, parameter: Tensor, *, key: tuple[int, ...]) -> torch.Generator:
            device = parameter.device
            if device not in self._generators:
                self._generators[device] = torch.Generator(device)
            mixed = 0
            for part in key:  # FNV-1a over whole numbers
                mixed = (mixed ^ part) * 0x100000001B3 % (1 << 63)
            return self._generators[device].manual_seed(mixed)

    return StochasticAdamW


def _pieces(tensor: Tensor, size: int) -> tuple[Tensor, ...]:
    """Views of a tensor, each of so many elements; the whole one for 0."""
    if not size:
        return (tensor,)
    flat = tensor.view(-1)
    return tuple(flat[start : start + size] for start in range(0, flat.numel(), size))
