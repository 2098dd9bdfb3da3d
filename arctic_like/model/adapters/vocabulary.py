"""Tokens that a tokenizer has and the base model does not: rows of its embeddings, and who trains them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_INPUTS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "embeddings")
_SHOWN = 4


def trains_rows(peft_config: Mapping[str, Any] | None) -> bool:
    """Whether an adapter's config, as the recipe states it, trains the input embeddings."""
    config = peft_config or {}
    saved = config.get("modules_to_save") or ()
    named = any(str(name).rpartition(".")[2] in _INPUTS for name in saved)
    return named or bool(config.get("trainable_token_indices"))


def grow(model: PreTrainedModel, rows: int) -> None:
    """Let input and output embeddings have `rows` rows; each new one is the mean of the old ones.

    The mean keeps the next token's distribution almost as it was (Hewitt 2021, "Initializing new word
    embeddings for pretrained language models"). Tied ones stay tied. At ZeRO-3 the new parameters are
    whole, as adapters are, and partitioned with them. Collective there.
    """
    import torch
    from torch import nn

    from arctic_like.model.initial import gathered

    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    made: dict[int, nn.Parameter] = {}
    for module in ends:
        if module is None:
            continue
        for name in ("weight", "bias"):
            old = getattr(module, name, None)
            if old is None:
                continue
            if id(old) not in made:
                with gathered([old]), torch.no_grad():
                    extra = old.float().mean(0, keepdim=True).to(old.dtype)
                    extra = extra.expand(rows - old.shape[0], *old.shape[1:])
                    made[id(old)] = nn.Parameter(torch.cat([old.detach(), extra]))
            setattr(module, name, made[id(old)])
        for size in ("num_embeddings", "out_features"):
            if hasattr(module, size):
                setattr(module, size, rows)
    model.config.get_text_config().vocab_size = rows
    model.vocab_size = rows


def untrained(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase | None
) -> str:
    """A sentence about tokens that the base's tokenizer lacks, where nothing trains embeddings."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    if base is None or any(p.requires_grad for p in embeddings.parameters()):
        return ""
    known = set(base.get_vocab())
    added = [token for token in tokenizer.get_vocab() if token not in known]
    if not added:
        return ""
    more = f" … +{len(added) - _SHOWN}" if len(added) > _SHOWN else ""
    return (
        f"the tokenizer has {len(added)} tokens that the base model's lacks "
        f"({', '.join(map(repr, sorted(added)[:_SHOWN]))}{more}), and the adapter does not train "
        "embeddings: they stay untrained; name them in model.peft_config.modules_to_save: "
        "[embed_tokens, lm_head]"
    )


def parted(model: Any) -> str:
    """A sentence where the base's tied ends get weights of their own; empty where they stay one."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return ""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    changed = [end for end in ends if hasattr(end, "base_layer") or hasattr(end, "original_module")]
    if not changed or getattr(model.active_peft_config, "ensure_weight_tying", False):
        return ""
    return (
        "input and output embeddings of the base are one matrix, and the adapter makes two of them; "
        "model.peft_config.ensure_weight_tying: true keeps them one"
    )
