"""`arctic-train chat PATH`: talk to what was trained."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer."


@click.command("chat")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True,
    help="Longest answer in tokens.",
)  # fmt: skip
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True,
    help="0 always takes the likeliest token; more draws at random.",
)  # fmt: skip
@click.option("--system", default="", help="A system message to start with.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
    help="Where the model runs.",
)  # fmt: skip
def command(
    path: Path, *, max_new_tokens: int, temperature: float, system: str, device: str
) -> None:
    """Talk to a trained model.

    PATH is a run directory, a checkpoint, or a Hugging Face folder such as an export. Without a
    terminal, the prompt is read from standard input and only the answer is printed.
    """
    model, tokenizer, on = load(path, device=device)
    talk = Conversation(
        model, tokenizer, device=on, max_new_tokens=max_new_tokens, temperature=temperature,
        system=system,
    )  # fmt: skip
    if is_interactive():
        interact(talk, name=path.name or str(path))
    else:
        answer_once(talk, sys.stdin.read().strip())


def is_interactive() -> bool:
    """Whether a person types."""
    return sys.stdin.isatty()


def load(path: Path, *, device: str) -> tuple[Any, PreTrainedTokenizerBase, str]:
    """Model (in eval mode), tokenizer and torch device. What loading prints goes to standard error.

    Raises RecipeError where there is nothing to talk to, CheckpointError where it cannot be read.
    """
    from arctic_like.inference import find, load_for_inference

    find(path)  # says within a moment, before anything heavy is imported, that there is nothing
    with contextlib.redirect_stdout(sys.stderr):
        on = device_for(device)
        be_quiet()
        model, tokenizer = load_for_inference(path, device=on)
        check_writes(model, path)
    return model, tokenizer, on


def check_writes(model: Any, path: Path) -> None:
    """Raise RecipeError for a model that scores, classifies or embeds: it has no next token."""
    if not model.can_generate():
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        raise RecipeError(
            Problem(f"is a {type(base).__name__}, which writes no text", file=str(path),
                    hint="name a language model")
        )  # fmt: skip


def device_for(asked: str) -> str:
    """The torch device for `auto`, `cpu` or `cuda`. Raises RecipeError where it is not here."""
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            Problem("there is no CUDA device here", place="--device", hint="leave --device out")
        )
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"


def be_quiet() -> None:
    """Let transformers neither warn nor draw progress bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def interact(talk: Conversation, *, name: str) -> None:
    """Ask and answer until the user leaves; nothing but leaving ends it."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing and history
    click.echo(f"{name}: {HELP}")
    while True:
        try:
            text = input("\n› ").strip()
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return
        if text in ("/exit", "/quit"):
            return
        if text == "/reset":
            talk.reset()
            click.echo("(the conversation is forgotten)")
        elif text in ("/help", "/?"):
            click.echo(HELP)
        elif text:
            _answer(talk, text)


def _answer(talk: Conversation, text: str) -> None:
    try:
        forgotten = talk.ask(text, write=_write)
    except KeyboardInterrupt:
        click.echo(" (stopped)")
    except RecipeError as error:
        click.echo(str(error), err=True)
    else:
        click.echo()
        if forgotten:
            click.echo(f"({forgotten} old messages no longer fit and were left out)", err=True)


def answer_once(talk: Conversation, text: str) -> None:
    """Print the answer to one prompt, and nothing else, on standard output."""
    if not text:
        raise RecipeError(
            Problem(
                "standard input is empty, so there is nothing to answer",
                hint="echo 'your prompt' | arctic-train chat PATH, or start it in a terminal",
            )
        )
    talk.ask(text, write=_write)
    click.echo()


def _write(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()


class Conversation:
    """A model, a tokenizer, and what was said so far."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: str = "cpu",
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        system: str = "",
    ) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.system = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.turns = []

    def ask(self, text: str, *, write: Callable[[str], None]) -> int:
        """Answer `text`, in pieces through `write`; returns how many old messages were left out.

        An answer that KeyboardInterrupt stops is remembered as far as it came. Raises RecipeError
        where the question alone is too long, or the chat template refuses it; it is then forgotten.
        """
        from arctic_like.generation import generation_config, stop_tokens

        self.turns.append({"role": "user", "content": text})
        try:
            prompt, forgotten = self._prompt()
        except RecipeError:
            self.turns.pop()
            raise
        stop = stop_tokens(self.tokenizer, self.model)
        pad = self.tokenizer.pad_token_id
        config = generation_config(
            stop=stop,
            pad=stop[0] if pad is None else pad,
            max_new_tokens=min(self.max_new_tokens, self._room(prompt)),
            temperature=self.temperature,
        )
        stream = TextStream(self.tokenizer, write, stop=stop)
        try:
            self._generate(prompt, config, stream)
        finally:
            self.turns.append({"role": "assistant", "content": stream.text})
        return forgotten

    def _generate(self, prompt: list[int], config: Any, stream: TextStream) -> None:
        import torch

        ids = torch.tensor([prompt], device=self.device)
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=stream,
        )

    def _prompt(self) -> tuple[list[int], int]:
        """The conversation as tokens; its oldest turns go where they leave no room to answer."""
        forgotten = 0
        while True:
            prompt = self._render()
            if self._room(prompt) >= min(self.max_new_tokens, 16):
                return prompt, forgotten
            if len(self.turns) == 1:
                raise RecipeError(
                    Problem(
                        f"the question has {len(prompt)} tokens and leaves no room to answer in "
                        f"the model's {self._positions()} positions",
                        hint="ask something shorter",
                    )
                )
            gone = min(2, len(self.turns) - 1)  # a question with its answer
            del self.turns[:gone]
            forgotten += gone

    def _render(self) -> list[int]:
        from jinja2.exceptions import TemplateError

        from arctic_like.generation import prompt_ids

        try:
            return prompt_ids(self.tokenizer, [*self.system, *self.turns])
        except TemplateError as error:
            hint = "leave --system out if the model knows no system message" if self.system else ""
            raise RecipeError(Problem(f"the chat template refuses: {error}", hint=hint)) from error

    def _positions(self) -> int | None:
        return getattr(self.model.config, "max_position_embeddings", None)

    def _room(self, prompt: list[int]) -> int:
        positions = self._positions()
        return self.max_new_tokens if positions is None else positions - len(prompt)


class TextStream:
    """Receives tokens from `generate` and writes text as soon as it is certain.

    What `generate` needs of a streamer: `put` (first the prompt, then each new token) and `end`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None], *, stop: list[int]
    ) -> None:
        self.tokenizer, self.write, self.stop = tokenizer, write, set(stop)
        self.text = ""
        self._tokens: list[int] = []
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """Take the prompt, then token after token, as tensors."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._tokens += [token for token in value.flatten().tolist() if token not in self.stop]
        self._flush(final=False)

    def end(self) -> None:
        """Write what was held back."""
        self._flush(final=True)

    def _flush(self, *, final: bool) -> None:
        text = str(self.tokenizer.decode(self._tokens, skip_special_tokens=True))
        if not final:
            # The bytes of an unfinished character decode to replacement characters.
            text = text.rstrip("\ufffd")
        if len(text) > len(self.text) and text.startswith(self.text):
            self.write(text[len(self.text) :])
            self.text = text
