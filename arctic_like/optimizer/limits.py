"""Which optimizers go with which ZeRO stage: what is known to be wrong is refused by name.

DeepSpeed (0.19.8) hands an optimizer flat pieces: from stage 1 on, all parameters of a group as one
vector, cut among the ranks; at stage 3 one group after another, each with a `step()` of its own. So

- an update that looks at a parameter's shape or norm sees neither from stage 1 on;
- a count that the optimizer keeps in its groups, as schedule-free ones and those of pytorch_optimizer
  do, runs too fast at stage 3;
- Adagrad is made anew over one group from stage 1 on, and no schedule reaches the new one;
- no stage passes the closure on that L-BFGS needs.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from torch.optim import Optimizer

SHAPED = frozenset(
    {"Adafactor", "AdaFactor", "Muon", "MuonWithAuxAdam", "AdaMuon", "LARS", "LARC", "Lamb", "LAMB",
     "FusedLamb", "NovoGrad", "Shampoo", "ScalableShampoo", "DistributedShampoo", "SOAP", "CAME", "SM3",
     "Adam_mini", "AdamMini", "GaLore", "GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreAdafactor", "APOLLO",
     "APOLLOAdamW", "QAPOLLOAdamW"}
)  # fmt: skip
"""Class names whose update depends on the shape or the norm of whole parameters."""

SHAPED_MODULES = ("apollo_torch.",)
"""Where classes of such an update have a name that says nothing: APOLLO's is `AdamW`."""

ELEMENTWISE = frozenset(
    {"Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "RMSprop", "Rprop", "SGD", "ASGD",
     "FusedAdam", "DeepSpeedCPUAdam", "Lion", "AdamWScheduleFree", "AdamW8bit", "PagedAdamW8bit",
     "StochasticAdamW"}
)  # fmt: skip
"""Class names that are right at every stage that they are allowed at: each element's update depends on
that element alone, or (8 bits) on its neighbours in no way that matters. Tested on two ranks."""

COUNTLESS = frozenset({"Lion"})
"""Classes of pytorch_optimizer whose update does not depend on the count in their groups."""


def check_optimizer(optimizer: Optimizer, *, zero_stage: int, divided: bool = False) -> None:
    """Raise RecipeError, at `optimizer.type`, for an optimizer that this stage would run wrongly.

    divided: whether a rank has parts of weights (tensor parallelism)."""
    import torch

    kind = type(optimizer)
    reason, hint = "", "take another optimizer"
    if _needs_closure(optimizer):
        reason = (
            "needs a closure that computes the loss again in the middle of its step; "
            "DeepSpeed passes none"
        )
        hint = "take one that updates from the gradient, such as adamw"
    elif isinstance(optimizer, torch.optim.SparseAdam):
        reason = "takes sparse gradients only, and DeepSpeed reduces dense ones"
        hint = "take adamw"
    elif zero_stage >= 1 and isinstance(optimizer, torch.optim.Adagrad):
        reason = (
            f"is made anew by DeepSpeed at ZeRO stage {zero_stage}, with a single group that no "
            "schedule reaches"
        )
        hint = "set deepspeed.zero_optimization.stage to 0, or take RMSprop or adamw"
    elif zero_stage >= 1 and _is_shaped(kind):
        reason = (
            "looks at the shape or the norm of whole parameters, but ZeRO stage "
            f"{zero_stage} gives it flat pieces"
        )
        hint = "set deepspeed.zero_optimization.stage to 0, or take another optimizer"
    elif divided and _is_shaped(kind):
        reason = "looks at the shape or the norm of whole parameters, of which a rank has parts"
        hint = "remove deepspeed.tensor_parallel, or take another optimizer"
    elif zero_stage == 3 and _counts_in_groups(optimizer):
        reason = (
            "counts its steps in its groups, but ZeRO stage 3 calls it once for each group: "
            "the count would run too fast"
        )
        hint = "set deepspeed.zero_optimization.stage to 2 or lower"
    if reason:
        name = "APOLLO" if kind.__module__.startswith("apollo_torch.") else kind.__qualname__
        raise RecipeError(Problem(f"is {name}, which {reason}", "optimizer.type", hint))


def untested(optimizer: Optimizer, *, zero_stage: int) -> str:
    """A sentence where nobody knows whether this optimizer is right at this stage; else empty."""
    name = type(optimizer).__name__
    if zero_stage == 0 or name in ELEMENTWISE:
        return ""
    return (
        f"optimizer {name}: neither DeepSpeed nor arctic_like has tested it at ZeRO stage "
        f"{zero_stage} (zero_allow_untested_optimizer is on). It is right there if each element's "
        "update depends on that element alone; compare a few steps with stage 0"
    )


def has_modes(optimizer: Optimizer) -> bool:
    """Whether an optimizer is schedule-free: it has `train()` and `eval()`, which change the weights."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def _is_shaped(kind: type) -> bool:
    """Of a class and those that it is derived from: a subclass updates as they do."""
    return any(
        cls.__name__ in SHAPED or cls.__module__.startswith(SHAPED_MODULES) for cls in kind.__mro__
    )


def _counts_in_groups(optimizer: Optimizer) -> bool:
    kind = type(optimizer)
    of_package = kind.__module__.startswith("pytorch_optimizer.")
    return has_modes(optimizer) or (of_package and kind.__name__ not in COUNTLESS)


def _needs_closure(optimizer: Optimizer) -> bool:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty
