"""Adapters that took a part of the base weight, written as plain LoRA over the base as it was.

PiSSA (Meng et al. 2024, eq. 2 and 3) and OLoRA begin with W = R + s·B₀A₀ and train B, A over the rest R. Over
W itself that is the change s·(BA - B₀A₀), which is LoRA of twice the rank with A' = [A; A₀] and
B' = [B, -B₀] at the same scale s. DoRA's magnitudes stay: they belong to the sum R + s·BA.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def took_from_base(model: Any) -> bool:
    """Whether layers of the adapter hold a part of their base weight."""
    return any(hasattr(module, "start") for module in model.modules())


def as_lora(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's weights by peft's names in files, as plain LoRA over the unchanged base; float32, in
    which the part that was taken is known."""
    import torch

    result = dict(state)
    for name, module in model.named_modules():
        start = getattr(module, "start", None)
        if start is None:
            continue
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        result[a] = torch.cat([state[a].float(), start[0]])
        result[b] = torch.cat([state[b].float(), -start[1]], dim=1)
    return result


def config_as_lora(config: Any) -> Any:
    """peft's config of the result: twice the rank, and the alpha that keeps the scale."""
    result = copy.deepcopy(config)
    factor = 2**0.5 if config.use_rslora else 2
    result.r, result.lora_alpha = 2 * config.r, factor * config.lora_alpha
    result.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    result.alpha_pattern = {key: factor * a for key, a in (config.alpha_pattern or {}).items()}
    result.init_lora_weights = True
    return result
