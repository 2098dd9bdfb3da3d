"""Answers from a model: what the exact-match callback and the chat share.

Knows transformers' `generate` and chat templates; does not know trainers, recipes or terminals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

Messages = Sequence[dict[str, Any]]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """The conversation as token ids, up to where the assistant begins to answer.

    Raises RecipeError where the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise RecipeError(
            Problem(
                "the tokenizer has no chat template, so it cannot be asked",
                hint="set tokenizer.chat_template, or take an instruct model's tokenizer",
            )
        )
    # Tokenised apart from rendering: the template writes the special tokens, none is added to them.
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def stop_tokens(tokenizer: PreTrainedTokenizerBase, model: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's end, the model's, the template's end of turn.

    The model's counts only where it is a special token here: a config that nobody adapted says 2.
    """
    special = {*tokenizer.all_special_ids}
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    of_model = stated if isinstance(stated, list | tuple) else [stated]
    found = {tokenizer.eos_token_id, *(token for token in of_model if token in special)}
    found.add(_end_of_turn(tokenizer, special))
    return sorted(token for token in found if token is not None)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, special: set[int]) -> int | None:
    """The first special token that the chat template writes after an answer, if any."""
    if not tokenizer.chat_template:
        return None
    asked = [{"role": "user", "content": "a"}]
    answer = "answer"
    text = tokenizer.apply_chat_template(
        [*asked, {"role": "assistant", "content": answer}], tokenize=False
    )
    rest = text[text.rindex(answer) + len(answer) :]
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in special), None)


def generation_config(
    *, stop: Sequence[int], pad: int, max_new_tokens: int, temperature: float = 0.0
) -> GenerationConfig:
    """How to generate; temperature 0 is greedy. The model's own generation config adds nothing."""
    from transformers import GenerationConfig

    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    return GenerationConfig(
        **{
            "do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 0 if sampling else 50,
            "num_beams": 1, "repetition_penalty": 1.0, "use_cache": True,
            "max_new_tokens": max_new_tokens, "eos_token_id": list(stop), "pad_token_id": pad,
            **sampling,
        }
    )  # fmt: skip


def shares(lengths: Sequence[int], *, batch_size: int, rank: int, size: int) -> Iterator[list[int]]:
    """This rank's batches of prompt indices, by length; over all ranks each index occurs once.

    Every rank gets the same number of batches, so that ranks can stay in step; an empty one is
    nothing to do.
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    own = order[rank::size]
    most = -(-len(order) // size)
    for start in range(0, most, batch_size):
        yield own[start : start + batch_size]


def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    config: GenerationConfig,
    device: str,
    synced: bool = False,
) -> list[list[int]]:
    """The answers' token ids to a batch of prompts, without the token that stopped them.

    Prompts are padded on the left, masked, and positions start at 0 at each first token. synced:
    keep calling the model until all ranks are through (ZeRO-3).
    """
    import torch

    width = max(len(prompt) for prompt in prompts)
    pad = config.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    out = model.generate(
        input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=synced
    )
    stop = set(config.eos_token_id)
    return [_until(row, stop) for row in out[:, width:].tolist()]


def _until(tokens: list[int], stop: set[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in stop:
            return tokens[:place]
    return tokens
