"""Linear maps of a model's hidden states to another width: trained with it, in checkpoints, in no export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from arctic_like.model.randomness import seed_by_name, untouched_randomness

if TYPE_CHECKING:
    from torch import nn

PROJECTIONS = "hidden_projections"
"""The child of a model that holds the maps, by the layer's number."""


def add_projections(model: Any, widths: Mapping[int, int], *, seed: int) -> None:
    """Give a transformers model a trained map, without bias, of each of some layers' hidden states.

    widths: layer → width of what it is mapped to. Where a forward is asked for hidden states, its output
    brings the mapped ones as `projected`, layer → (rows, length, width): inside the forward, where ZeRO-3
    gathers the maps. Their weights depend on seed and layer; the model's dtype.
    """
    from torch import nn

    own = int(model.config.get_text_config().hidden_size)
    dtype = next(model.parameters()).dtype
    maps = nn.ModuleDict()
    with untouched_randomness():
        for layer, width in widths.items():
            seed_by_name(seed, f"{PROJECTIONS}.{layer}")
            maps[str(layer)] = nn.Linear(own, width, bias=False).to(dtype)
    setattr(model, PROJECTIONS, maps)
    names = [f"{PROJECTIONS}.{name}" for name, _ in maps.named_parameters()]
    model._keys_to_ignore_on_save = [*(model._keys_to_ignore_on_save or ()), *names]

    def bring(module: Any, _: Any, output: Any) -> Any:
        states = getattr(output, "hidden_states", None)
        if states is not None:
            held = getattr(module, PROJECTIONS)
            output.projected = {layer: held[str(layer)](states[layer]) for layer in widths}
        return output

    model.register_forward_hook(bring)


def drop_projections(model: nn.Module) -> None:
    """Take the maps away from a model that is written for others."""
    if hasattr(model, PROJECTIONS):
        delattr(model, PROJECTIONS)
