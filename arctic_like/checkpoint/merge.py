"""An adapter brought into its base: one model, proved to answer as the two did."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from arctic_like.errors import RunError
from arctic_like.model.adapters.build import BASE, NAME, is_prompt

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-5
"""How far an output may move, in float32, as a share of the largest one."""
_ROWS, _LENGTH = 3, 24


def merge(model: Any) -> tuple[Any, float]:
    """The base with the adapter merged into its weights, float32; and how far its logits (of a model
    without, its hidden states) moved, as a share of the largest. The model that was given is used up.

    The sums are computed in float32 whatever the weights' dtype was. Raises RunError where an adapter
    cannot be merged, and where the result does not answer as base and adapter together.
    """
    _check_mergeable(model)
    model = model.float().eval()
    inputs = _inputs(int(model.config.get_text_config().vocab_size))
    before = _outputs(model, inputs)
    _untie(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload(safe_merge=True)
    head, embeddings = merged.get_output_embeddings(), merged.get_input_embeddings()
    if head is not None and head.weight is not embeddings.weight:
        merged.config.get_text_config().tie_word_embeddings = False
        merged.config.tie_word_embeddings = False
    moved = float((_outputs(merged, inputs) - before).abs().max() / before.abs().max())
    if not moved <= TOLERANCE:
        raise RunError(
            f"the merged model's logits differ by {moved:.2g} of the largest, more than {TOLERANCE}\n"
            "    nothing was written; serve base and adapter apart"
        )
    return merged, moved


def _check_mergeable(model: Any) -> None:
    about = vars(model)[BASE]
    kind = model.peft_config[NAME].peft_type.value
    if is_prompt(model):
        reason = f"{kind} has virtual tokens, which no weight of the base could take up"
    elif about.get("changed_by") == "loftq":
        reason = "LoftQ trained it over a quantised base, which the base as it is does not replace"
    else:
        return
    raise RunError(f"this adapter cannot be merged: {reason}\n    serve base and adapter apart")


def _untie(model: Any) -> None:
    """Give the head a weight of its own where the adapter changes one of two tied ends."""
    import torch

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    wrapped = [end for end in (head, embeddings) if hasattr(end, "base_layer")]
    inner = [getattr(end, "base_layer", end) for end in (head, embeddings)]
    if wrapped and inner[0] is not None and inner[0].weight is inner[1].weight:
        inner[0].weight = torch.nn.Parameter(inner[0].weight.detach().clone())


def _inputs(vocabulary: int) -> Tensor:
    """Some rows of tokens from all over the vocabulary, always the same."""
    import torch

    places = torch.arange(_ROWS * _LENGTH).view(_ROWS, _LENGTH)
    return (places * 7919 + 3) % vocabulary


def _outputs(model: Any, ids: Tensor) -> Tensor:
    """Row by row: without a padding token transformers pools no scores of two."""
    import torch

    found = []
    with torch.no_grad():
        for row in ids:
            output = model(input_ids=row[None])
            logits = getattr(output, "logits", None)
            found.append(output.last_hidden_state if logits is None else logits)
    return torch.cat(found)
