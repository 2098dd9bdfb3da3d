"""What the model answers to a few prompts, now and then: in the log and in the trackers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import Field, model_validator

from arctic_like.callbacks.base import Callback, CallbackConfig
from arctic_like.config.base import PartConfig, wrong
from arctic_like.config.interval import Interval
from arctic_like.config.values import HumanFloat, HumanInt
from arctic_like.errors import Problem, RecipeError
from arctic_like.generation import generate_batch, generation_config, prompt_ids, stop_tokens
from arctic_like.registry.choice import Choice

if TYPE_CHECKING:
    from arctic_like.trainer.base import Trainer

_PURPOSE = 0x67656E


class GenerateSamplesConfig(CallbackConfig):
    """`type: generate_samples`."""

    type: str = "generate_samples"

    prompts: list[str | list[dict[str, Any]]] = []
    """What to answer: texts, or conversations (lists of `{role, content}`)."""

    source: Annotated[
        PartConfig | None, Choice("source", short="name_or_path", default="huggingface")
    ] = None
    """Conversations to answer up to their last assistant turn, which is shown beside the answer: a data
    source, or its path."""

    limit: HumanInt = Field(default=8, ge=1)
    """Take at most so many prompts of the source."""

    interval: Interval = Interval()
    """How often: `100` (steps), `1 epoch`, `5%`, `10 min`; at every evaluation unless given (with the
    weights that are evaluated)."""

    chat: bool | None = None
    """Whether a text is a user's turn (true) or the beginning of a text to go on with (false); a turn where
    the tokenizer has a chat template, unless given."""

    max_new_tokens: HumanInt = Field(default=64, ge=1)
    """Longest answer in tokens."""

    temperature: Annotated[HumanFloat, Field(ge=0)] = 0.0
    """0 answers greedily; above, tokens are drawn. The draws depend on seed, step and prompt alone."""

    batch_size: HumanInt = Field(default=8, ge=1)
    """Prompts that one rank answers at once."""

    @model_validator(mode="after")
    def _something(self) -> GenerateSamplesConfig:
        if not self.prompts and self.source is None:
            raise wrong("is empty, and there is no source", place="prompts",
                        hint="list some texts, or name a source of conversations")  # fmt: skip
        return self


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens, how it is shown, and the answer that its source holds ("" for none)."""

    ids: tuple[int, ...]
    text: str
    expected: str = ""


class GenerateSamples(Callback):
    """`type: generate_samples`: a table of prompts and answers in the log and in every tracker.

    Batches of prompts are dealt out to the ranks; what is answered is the same on any number of them.
    Random generators are as they were afterwards.
    """

    name = "generate_samples"
    config_type = GenerateSamplesConfig
    needs_whole_layers = True
    config: GenerateSamplesConfig

    def __init__(self, config: GenerateSamplesConfig) -> None:
        super().__init__(config)
        self._prompts: list[Prompt] = []

    def on_setup_end(self, trainer: Trainer) -> None:
        """Read the prompts, so that what is wrong with them is said before the first step."""
        if not hasattr(trainer.module, "generate"):
            raise _wrong(
                f"needs a model that generates; {type(trainer.module).__name__} has no `generate`",
                "", "take it out of `callbacks`",
            )  # fmt: skip
        self._prompts = read_prompts(self.config, trainer.tokenizer)
        positions = getattr(trainer.module.config, "max_position_embeddings", None)
        longest = max(len(prompt.ids) for prompt in self._prompts)
        if positions and longest + self.config.max_new_tokens > positions:
            raise _wrong(
                f"is {self.config.max_new_tokens}; with the longest prompt ({longest} tokens) that is "
                f"more than the model's {positions} positions", "max_new_tokens",
                "lower it, or leave long prompts out",
            )  # fmt: skip

    def on_step_end(self, trainer: Trainer) -> None:
        """Answer, if the interval is due."""
        if self.config.interval and trainer.is_due(self.config.interval, f"{self.name}-{id(self)}"):
            with trainer.clock_stopped():
                self.show(trainer)

    def on_evaluate_end(self, trainer: Trainer, results: dict[str, float]) -> None:
        """Answer, if there is no interval."""
        if not self.config.interval:
            self.show(trainer)

    def show(self, trainer: Trainer) -> None:
        """Answer all prompts, log the table and hand it to the trackers. Collective."""
        answers = self.answers(trainer)
        if not trainer.world.is_main:
            return
        from loguru import logger

        expects = any(prompt.expected for prompt in self._prompts)
        columns = ["prompt", "answer", *(["expected"] if expects else [])]
        rows = [
            [prompt.text, answer, *([prompt.expected] if expects else [])]
            for prompt, answer in zip(self._prompts, answers, strict=True)
        ]
        step = trainer.global_step
        logger.info("{}", f"samples at step {step}\n{table(columns, rows)}")
        for tracker in trainer.equipment.recorder.trackers:
            if tracker.name != "console":
                tracker.table(step, "samples", columns, rows)

    def answers(self, trainer: Trainer) -> list[str]:
        """The answer to each prompt, on every rank. Collective."""
        import torch

        from arctic_like.data.order import key_of

        model, tokenizer, world = trainer.module, trainer.tokenizer, trainer.world
        in_step = trainer.zero_stage == 3 and world.size > 1
        stop = stop_tokens(tokenizer, model)
        config = generation_config(
            stop=stop, pad=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop[0],
            max_new_tokens=self.config.max_new_tokens, temperature=self.config.temperature,
        )  # fmt: skip
        size = self.config.batch_size
        batches = [self._prompts[i : i + size] for i in range(0, len(self._prompts), size)]
        mine: dict[int, list[str]] = {}
        was_training = model.training
        model.eval()
        try:
            with trainer.preserve_random_state(), torch.no_grad():
                for first in range(0, len(batches), world.size):
                    number = first + world.rank
                    own = number < len(batches)
                    if not own and not in_step:
                        continue
                    # a rank without a batch keeps the others company; its answers are not used
                    batch = batches[number] if own else batches[0][:1]
                    key = key_of(trainer.config.seed, trainer.global_step, _PURPOSE, number)
                    torch.manual_seed(key % 2**63)
                    found = generate_batch(
                        model, [prompt.ids for prompt in batch],
                        config=config, device=trainer.device, synced=in_step,
                    )  # fmt: skip
                    if own:
                        mine[number] = [
                            tokenizer.decode(ids, skip_special_tokens=True) for ids in found
                        ]
        finally:
            model.train(was_training)
        everyone = {
            number: texts
            for part in trainer.session.host.gather(mine)
            for number, texts in part.items()
        }
        return [text for number in sorted(everyone) for text in everyone[number]]


def read_prompts(config: GenerateSamplesConfig, tokenizer: Any) -> list[Prompt]:
    """The recipe's prompts, then those of the source. Raises RecipeError naming what is wrong."""
    chat = bool(tokenizer.chat_template) if config.chat is None else config.chat
    found = []
    for number, prompt in enumerate(config.prompts):
        if isinstance(prompt, str) and not chat:
            ids = tokenizer(prompt)["input_ids"]
            stop = tokenizer.eos_token_id
            if ids and ids[-1] == stop:  # some tokenizers end every text
                ids = ids[:-1]
            found.append(Prompt(tuple(ids), prompt))
        else:
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            if not turns or any(not {"role", "content"} <= turn.keys() for turn in turns):
                raise _wrong("is no conversation", f"prompts.{number}",
                             "write [{role: user, content: …}]")  # fmt: skip
            text = prompt if isinstance(prompt, str) else _last(turns)
            found.append(Prompt(tuple(prompt_ids(tokenizer, turns)), text))
        if not found[-1].ids:
            raise _wrong("is empty", f"prompts.{number}", "write a text, or take it out")
    if config.source is not None:
        found += _of_source(config, tokenizer)
    return found


def _of_source(config: GenerateSamplesConfig, tokenizer: Any) -> list[Prompt]:
    from arctic_like.data.base import SourceConfig, make_source, usable
    from arctic_like.data.shapes import RowError, conversation
    from arctic_like.data.tokenise import chosen_rows

    source = cast(SourceConfig, config.source)
    found = []
    for place, row in itertools.islice(usable(chosen_rows(make_source(source))), config.limit):
        try:
            turns = conversation(row, source)
        except RowError as error:
            raise _wrong(
                f"has a row that {error} ({place})", "source", "see `data.sources`"
            ) from None
        plain = [{k: v for k, v in turn.items() if k != "train"} for turn in turns]
        answered = [i for i, turn in enumerate(plain) if turn["role"] == "assistant"]
        end = answered[-1] if answered else len(plain)
        expected = str(plain[end]["content"]) if answered else ""
        if not end:
            raise _wrong(f"has a row without a question ({place})", "source",
                         "each row needs a turn to answer")  # fmt: skip
        asked = plain[:end]
        found.append(Prompt(tuple(prompt_ids(tokenizer, asked)), _last(asked), expected))
    if not found:
        raise _wrong("holds no rows", "source", "name a source with conversations")
    return found


def _last(turns: Sequence[dict[str, Any]]) -> str:
    return str(turns[-1]["content"])


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text: every value on a line of its own, after its column's name."""
    width = max(len(column) for column in columns)
    indent = "\n" + " " * (width + 4)
    return "\n\n".join(
        "\n".join(
            f"  {column:<{width}}  {str(value).strip().replace(chr(10), indent)}"
            for column, value in zip(columns, row, strict=True)
        )
        for row in rows
    )


def _wrong(message: str, key: str, hint: str) -> RecipeError:
    return RecipeError(
        Problem(message, f"callbacks.generate_samples{'.' if key else ''}{key}", hint)
    )
