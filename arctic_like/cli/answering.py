"""Batches of prompts through a model: answers that do not depend on the batch."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from arctic_like.cli.prompt_rows import PromptRow, refuse
from arctic_like.errors import Problem

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def batches(sizes: Mapping[int, tuple[int, int]], *, batch_size: int) -> Iterator[list[int]]:
    """Prompts of like length together, the longest last; only those that may have answers of the same
    length.

    sizes: prompt's number → (most tokens of its answer, its own tokens).
    """
    order = sorted(sizes, key=lambda number: (-sizes[number][0], sizes[number][1], number))
    batch: list[int] = []
    for number in order:
        if batch and (len(batch) == batch_size or sizes[number][0] != sizes[batch[0]][0]):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


class Generator:
    """Answers prompts with one model and one set of options.

    sampling: temperature, top_p and seed; empty: the likeliest token always.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, *, device: str, max_new_tokens: int,
        raw: bool, sampling: Mapping[str, Any],
    ) -> None:  # fmt: skip
        from arctic_like.generation import stop_tokens

        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.max_new_tokens, self.sampling = max_new_tokens, sampling
        self.templated = bool(tokenizer.chat_template) and not raw
        self.stop = stop_tokens(tokenizer, model)
        pad = tokenizer.pad_token_id
        self.pad = pad if pad is not None else self.stop[0] if self.stop else 0

    def encode(self, rows: Sequence[PromptRow], *, file: Path) -> list[list[int]]:
        """Every row as token ids. Raises RecipeError, with file and line, for rows that cannot be asked."""
        found: list[list[int]] = []
        problems: list[Problem] = []
        for row in rows:
            try:
                ids = self._encoded(row)
                if not ids:
                    raise ValueError("has no token")
                if self.room(ids) < 1:
                    raise ValueError(
                        f"has {len(ids)} tokens and leaves no room to answer in the model's "
                        f"{self._positions()} positions"
                    )
            except ValueError as error:
                problems.append(Problem(str(error), file=str(file), line=row.line))
            else:
                found.append(ids)
        refuse(problems)
        return found

    def room(self, prompt: Sequence[int]) -> int:
        """The most tokens that the answer to a prompt may have."""
        positions = self._positions()
        if positions is None:
            return self.max_new_tokens
        return min(self.max_new_tokens, positions - len(prompt))

    def answer(self, prompts: Mapping[int, Sequence[int]]) -> dict[int, str]:
        """Row's number → answer, for a batch of rows that have the same room."""
        from arctic_like.generation import generate_batch, generation_config

        config = generation_config(
            stop=self.stop, pad=self.pad, max_new_tokens=self.room(next(iter(prompts.values())))
        )
        model: Any = self.model
        if self.sampling:
            drawing = functools.partial(model.generate, logits_processor=self._draws(list(prompts)))
            model = SimpleNamespace(generate=drawing)
        answers = generate_batch(model, list(prompts.values()), config=config, device=self.device)
        return {
            number: str(self.tokenizer.decode(tokens, skip_special_tokens=True))
            for number, tokens in zip(prompts, answers, strict=True)
        }

    def _encoded(self, row: PromptRow) -> list[int]:
        from jinja2.exceptions import TemplateError

        from arctic_like.generation import prompt_ids

        messages = row.messages
        if messages is None and self.templated:
            messages = [{"role": "user", "content": row.content["prompt"]}]
        if messages is None:
            return list(self.tokenizer(row.content["prompt"])["input_ids"])
        if not self.templated:
            raise ValueError("has messages, which need a chat template")
        try:
            return prompt_ids(self.tokenizer, messages)
        except TemplateError as error:
            raise ValueError(f"is refused by the chat template: {error}") from error

    def _draws(self, numbers: Sequence[int]) -> list[Any]:
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        s = self.sampling
        chain: Any = LogitsProcessorList([TemperatureLogitsWarper(float(s["temperature"]))])
        if s["top_p"] < 1:
            chain.append(TopPLogitsWarper(float(s["top_p"])))
        chain.append(Draws([(s["seed"], number) for number in numbers]))
        return chain  # type: ignore[no-any-return]

    def _positions(self) -> int | None:
        return getattr(self.model.config, "max_position_embeddings", None)


class Draws:
    """A logits processor after which the largest score is a draw from the softmax of the scores.

    Gumbel's trick: argmax(x + g), g = -log(-log u), has the distribution softmax(x). Every row has a
    random generator of its own, so that what it draws depends on its key alone, not on its batch.
    """

    def __init__(self, keys: Sequence[tuple[int, int]]) -> None:
        import torch
        import xxhash

        self._generators = [
            torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{seed}:{row}".encode()) >> 1)
            for seed, row in keys
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: (rows, vocabulary), after temperature and top-p."""
        import torch

        noise = torch.stack([
            torch.empty(scores.shape[-1]).exponential_(generator=generator)
            for generator in self._generators
        ])  # fmt: skip
        return scores.float() - noise.to(scores.device).log()
