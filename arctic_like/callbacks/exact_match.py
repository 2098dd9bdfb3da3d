"""How many held-out prompts the model answers exactly, by generating, at every evaluation."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from pydantic import Field

from arctic_like.callbacks.base import Callback, CallbackConfig
from arctic_like.config.base import PartConfig
from arctic_like.config.values import HumanInt
from arctic_like.errors import Problem, RecipeError
from arctic_like.generation import (
    generate_batch,
    generation_config,
    prompt_ids,
    shares,
    stop_tokens,
)  # fmt: skip
from arctic_like.registry.choice import Choice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from arctic_like.trainer.base import Trainer


class ExactMatchConfig(CallbackConfig):
    """Which conversations to answer, and how."""

    type: str = "exact_match"

    source: Annotated[PartConfig, Choice("source", short="name_or_path", default="huggingface")]
    """Conversations whose last assistant turn is the right answer: a data source, or its path."""

    metric: str = "exact_match"
    """Name of the value: `eval/<metric>`, and `eval/<metric>/<group>` for each group."""

    group_by: str | None = None
    """Column that names a row's group; `kind` where all rows have it. Empty text: no groups."""

    limit: HumanInt | None = Field(default=None, ge=1)
    """Ask only the first so many."""

    max_new_tokens: HumanInt = Field(default=64, ge=1)
    """Longest answer in tokens; a longer one is cut, and so wrong."""

    batch_size: HumanInt = Field(default=64, ge=1)
    """Prompts that one rank answers at once."""


@dataclass(frozen=True)
class Task:
    """One prompt, its right answer (stripped), and its group ("" for none)."""

    prompt: tuple[int, ...]
    answer: str
    group: str


class ExactMatch(Callback):
    """`type: exact_match`: answers greedily, and compares text without surrounding white space.

    The answer to each prompt is what the model says after the conversation up to its last assistant
    turn. Prompts are split over the ranks; all ranks get the same values.
    """

    name = "exact_match"
    config_type: ClassVar[type[CallbackConfig]] = ExactMatchConfig
    needs_whole_layers = True
    config: ExactMatchConfig

    def __init__(self, config: ExactMatchConfig) -> None:
        super().__init__(config)
        self._tasks: list[Task] = []
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def on_setup_end(self, trainer: Trainer) -> None:
        """Read the prompts, so that what is wrong with them is said before the first step."""
        if not hasattr(trainer.module, "generate"):
            raise RecipeError(
                Problem(
                    f"exact_match needs a model that generates; {type(trainer.module).__name__} "
                    "has no `generate`",
                    place="callbacks",
                    hint="take exact_match out of `callbacks`",
                )
            )
        self._tasks = read_tasks(self.config, trainer.tokenizer)
        check_room(self._tasks, trainer.module, self.config)

    def on_evaluate_end(self, trainer: Trainer, results: dict[str, float]) -> None:
        """Answer all prompts and add the shares of right answers to the evaluation line."""
        if not self._tasks:
            self.on_setup_end(trainer)
        hits = self._answer(trainer)
        values = self._values(trainer, hits)
        self._first = self._first or values
        self._last = values
        results.update({f"eval/{key}": value for key, value in values.items()})

    def _answer(self, trainer: Trainer) -> Counter[str]:
        """Right answers by group, among this rank's prompts."""
        import torch

        model, tokenizer, world = trainer.module, trainer.tokenizer, trainer.world
        in_step = trainer.zero_stage == 3 and world.size > 1
        stop = stop_tokens(tokenizer, model)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop[0]
        config = generation_config(stop=stop, pad=pad, max_new_tokens=self.config.max_new_tokens)
        lengths = [len(task.prompt) for task in self._tasks]
        hits: Counter[str] = Counter()
        was_training = model.training
        model.eval()
        try:
            with trainer.preserve_random_state(), torch.no_grad():
                for batch in shares(
                    lengths, batch_size=self.config.batch_size, rank=world.rank, size=world.size
                ):
                    tasks = [self._tasks[index] for index in batch]
                    if not tasks and not in_step:
                        continue
                    asked = tasks or self._tasks[:1]  # keeps the other ranks company; not counted
                    answers = generate_batch(
                        model, [task.prompt for task in asked],
                        config=config, device=trainer.device, synced=in_step,
                    )  # fmt: skip
                    for task, answer in zip(tasks, answers, strict=False):
                        text = tokenizer.decode(answer, skip_special_tokens=True).strip()
                        hits[task.group] += text == task.answer
        finally:
            model.train(was_training)
        return hits

    def _values(self, trainer: Trainer, hits: Counter[str]) -> dict[str, float]:
        """Shares of right answers by metric name, from all ranks' counts."""
        asked = Counter(task.group for task in self._tasks)
        counts = trainer.sum_over_ranks([float(hits[group]) for group in sorted(asked)])
        right = dict(zip(sorted(asked), counts, strict=True))
        metric = self.config.metric
        values = {metric: sum(counts) / len(self._tasks)}
        values.update(
            {f"{metric}/{group}": right[group] / asked[group] for group in right if group}
        )
        return values

    def summary(self) -> list[tuple[str, float, float]]:
        """(name, first, last) of the whole and of each group, as shares between 0 and 1."""
        return [(key, self._first.get(key, value), value) for key, value in self._last.items()]

    def state_dict(self) -> dict[str, Any]:
        """The first and the last values, so that a resumed run's summary goes back to the start."""
        return {"first": dict(self._first), "last": dict(self._last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._first, self._last = dict(state["first"]), dict(state["last"])


def read_tasks(config: ExactMatchConfig, tokenizer: PreTrainedTokenizerBase) -> list[Task]:
    """The prompts of the source, in its order. Raises RecipeError naming the row that is wrong."""
    from arctic_like.data.base import SourceConfig, make_source, usable
    from arctic_like.data.shapes import RowError, conversation
    from arctic_like.data.tokenise import chosen_rows

    source = cast(SourceConfig, config.source)
    rows = list(itertools.islice(usable(chosen_rows(make_source(source))), config.limit))
    if not rows:
        raise _wrong("holds no rows", "name a source with conversations")
    group_by = config.group_by
    if group_by is None:
        group_by = "kind" if all("kind" in row for _, row in rows) else ""
    tasks = []
    for place, row in rows:
        try:
            messages = conversation(row, source)
        except RowError as error:
            raise _wrong(f"has a row that {error} ({place})", "see `data.sources`") from None
        tasks.append(_task(place, row, messages, group_by=group_by, tokenizer=tokenizer))
    return tasks


def _task(
    place: str,
    row: dict[str, Any],
    messages: list[dict[str, Any]],
    *,
    group_by: str,
    tokenizer: PreTrainedTokenizerBase,
) -> Task:
    answered = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answered or answered[-1] == 0:
        raise _wrong(
            f"has a row without a question and its answer ({place})",
            "each row needs an assistant turn after the turn that it answers",
        )
    if group_by and group_by not in row:
        raise _wrong(
            f"has a row without the column {group_by!r} ({place})",
            "name another column in group_by, or leave it out",
        )
    end = answered[-1]
    return Task(
        prompt=tuple(prompt_ids(tokenizer, [_plain(message) for message in messages[:end]])),
        answer=str(messages[end]["content"]).strip(),
        group=str(row[group_by]) if group_by else "",
    )


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != "train"}


def check_room(tasks: list[Task], model: Any, config: ExactMatchConfig) -> None:
    """Raise RecipeError where a prompt and its answer would not fit into the model's positions."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = max(len(task.prompt) for task in tasks)
    if positions and longest + config.max_new_tokens > positions:
        raise _wrong(
            f"has a prompt of {longest} tokens; with max_new_tokens ({config.max_new_tokens}) that "
            f"is more than the model's {positions} positions",
            "lower max_new_tokens, or leave out long prompts",
        )


def _wrong(message: str, hint: str) -> RecipeError:
    return RecipeError(Problem(message, place="callbacks.exact_match.source", hint=hint))
