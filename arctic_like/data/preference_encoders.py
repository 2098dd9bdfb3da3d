"""Preferences → tokens and masks: each answer with its prompt is a document of its own.

The prompt is what stands before the first answer's turn: the conversation up to there and the
header, where generation begins. It is never trained. Prompt and answer are tokenised **as one
text**, since a tokenizer may treat the start of a text otherwise than its middle; the border is
found from the tokens' offsets. A token on the border belongs to the answer. The text before the
border must be the same in both documents of a pair, and so are its tokens, but that a tokenizer may
join what stands just before the border (line breaks) otherwise before one answer than before the other;
such pairs are counted (`prompts_differ`). The prefix is stored with each of the two: a model that
reads documents one by one needs no other layout, and they stay documents like all others.

Columns (one value a document, both documents of a pair alike): `prompt`, how many tokens of the
prompt they have in common, of which may be cut; `desirable`, 1 or 0, of unpaired answers; `margin`,
the 64 bits of a float, of pairs that have one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from arctic_like.data import shapes
from arctic_like.data.base import BadRow, Row, SourceConfig
from arctic_like.data.encode import Encoded, joined
from arctic_like.data.encoders import MaskRules, bad_row, past_empty_thoughts
from arctic_like.data.masks import TextEncoder, first_token, token_mask
from arctic_like.data.templates import ChatTemplate, Rendered
from arctic_like.data.thinking import without_thoughts

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

TruncationMode = Literal["keep_start", "keep_end"]


@dataclass
class _Document:
    """tokens: int32, trained: uint8, both (length,). prompt: tokens before the answer."""

    tokens: NDArray[np.int32]
    trained: NDArray[np.uint8]
    prompt: int


class _PreferenceEncoder:
    """What pairs and unpaired answers have in common.

    rules: `train_on` is not looked at. max_prompt_length, truncation: a longer prompt is cut to as
    many tokens, its start or its end kept.
    """

    columns: tuple[str, ...] = ("prompt",)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: SourceConfig,
        rules: MaskRules,
        *,
        max_prompt_length: int,
        truncation: TruncationMode,
    ) -> None:
        self.source = source
        self.rules = rules
        self.max_prompt_length = max_prompt_length
        self.truncation = truncation
        self.template = ChatTemplate(tokenizer)
        self.encode = TextEncoder(tokenizer)

    def render(self, row: dict[str, Any]) -> tuple[list[_Answer], int]:
        """The answers of a row in their order, and the value of its column. Raises RowError."""
        raise NotImplementedError

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        """As many documents a row as it has answers."""
        rendered: list[tuple[str, list[_Answer], int]] = []
        bad: list[BadRow] = []
        for place, row in rows:
            try:
                rendered.append((place, *self.render(row)))
            except shapes.RowError as error:
                bad.append(bad_row(place, error))
        texts = [one.rendered.text for _, answers, _ in rendered for one in answers]
        encodings = iter(self.encode(texts, add_special_tokens=False))
        counts: Counter[str] = Counter()
        places: list[str] = []
        documents: list[_Document] = []
        labels: list[int] = []
        for place, answers, label in rendered:
            mine = [next(encodings) for _ in answers]
            try:
                found = self._documents(answers, mine, counts)
            except shapes.RowError as error:
                bad.append(bad_row(place, error))
                continue
            places += [place] * len(found)
            documents += found
            labels += [label] * len(found)
        encoded = joined(
            places, [one.tokens for one in documents], [one.trained for one in documents], counts
        )
        values = ([one.prompt for one in documents], labels)
        encoded.columns.update(
            {
                name: np.array(found, dtype=np.int64)
                for name, found in zip(self.columns, values, strict=False)
            }
        )
        encoded.bad += bad
        return encoded

    def _answer(
        self, prompt: list[shapes.Message], answer: list[shapes.Message], tools: list[Any] | None
    ) -> _Answer:
        if any("train" in message for message in answer):
            raise shapes.RowError(
                "has `train` in a turn of an answer; the answers of preferences are trained whole",
                hint="leave `train` out",
            )
        messages = [{**message, "train": False} for message in prompt] + answer
        if self.rules.thinking == "drop":
            messages = without_thoughts(messages)
        found = self.template.trained(
            messages, tools=tools, end_of_turn=self.rules.train_end_of_turn
        )
        if not found.spans:
            raise shapes.RowError("has an answer of which nothing is trained")
        border = found.spans[0][0]
        return _Answer(
            past_empty_thoughts(found) if self.rules.ignore_empty_think else found, border
        )

    def _documents(
        self, answers: list[_Answer], encodings: list[Any], counts: Counter[str]
    ) -> list[_Document]:
        documents = []
        for answer, encoding in zip(answers, encodings, strict=True):
            try:
                mask = token_mask(encoding, answer.rendered.spans)
            except ValueError as error:
                raise shapes.RowError(f"cannot be masked exactly: {error}") from None
            first = first_token(encoding, answer.border, len(answer.rendered.text))
            tokens = np.array(encoding.ids, dtype=np.int32)
            prompt = len(tokens) if first is None else first
            if not mask.trained[1:].any():  # nothing predicts the first token
                raise shapes.RowError("has an answer without a trained token")
            documents.append(_Document(tokens, mask.trained, prompt))
            counts["straddling"] += mask.straddling
            counts["endless"] += answer.rendered.endless
        longest = max(one.prompt for one in documents)
        prompt = _common(documents)
        counts["prompts_differ"] += prompt < longest
        cut = min(longest - self.max_prompt_length, prompt)
        if cut > 0:
            counts["prompts_cut"] += 1
            gone = slice(prompt - cut, prompt) if self.truncation == "keep_start" else slice(cut)
            for one in documents:
                one.tokens = np.delete(one.tokens, gone)
                one.trained = np.delete(one.trained, gone)
            prompt -= cut
        for one in documents:
            one.prompt = prompt
        return documents


def _common(documents: list[_Document]) -> int:
    """How many tokens of the prompt all documents begin with."""
    first, shortest = documents[0].tokens, min(one.prompt for one in documents)
    same = np.ones(shortest, dtype=np.bool_)
    for one in documents[1:]:
        same &= one.tokens[:shortest] == first[:shortest]
    return shortest if same.all() else int(np.argmin(same))


@dataclass(frozen=True)
class _Answer:
    """A prompt with an answer. border: where in the text the answer begins."""

    rendered: Rendered
    border: int


class PairEncoder(_PreferenceEncoder):
    """Rows with a chosen and a rejected answer to one prompt: two documents each, chosen first.

    with_margin: they also say by how much the one was judged better.
    """

    def __init__(self, *args: Any, with_margin: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.with_margin = with_margin
        if with_margin:
            self.columns = ("prompt", "margin")

    def render(self, row: dict[str, Any]) -> tuple[list[_Answer], int]:
        pair, tools = shapes.pair(row, self.source), shapes.tools(row)
        answers = [
            self._answer(pair.prompt, answer, tools) for answer in (pair.chosen, pair.rejected)
        ]
        _check_apart(answers, "as its chosen and its rejected answer")
        if not self.with_margin:
            return answers, 0
        margin = np.float64(shapes.margin(row, self.source))
        return answers, int(margin.view(np.int64))


class RankingEncoder(_PreferenceEncoder):
    """Rows with `count` answers to one prompt in order of preference: as many documents each, best first."""

    def __init__(self, *args: Any, count: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.count = count

    def render(self, row: dict[str, Any]) -> tuple[list[_Answer], int]:
        ranking, tools = shapes.ranking(row, self.source), shapes.tools(row)
        if len(ranking.answers) != self.count:
            raise shapes.RowError(
                f"has {len(ranking.answers)} answers; expected are {self.count}",
                hint="set data.answers, one number for all rows, or data.on_bad_sample: skip",
            )
        answers = [self._answer(ranking.prompt, one, tools) for one in ranking.answers]
        _check_apart(answers, "in two of its answers")
        return answers, 0


def _check_apart(answers: list[_Answer], where: str) -> None:
    """Raise RowError where two answers are the same, or their prompts are not."""
    texts = [one.rendered.text for one in answers]
    if len(set(texts)) < len(texts):
        raise shapes.RowError(
            f"has the same text {where}",
            hint="leave such rows out, or set data.on_bad_sample: skip",
        )
    if len({one.rendered.text[: one.border] for one in answers}) > 1:
        raise shapes.RowError(
            "has a prompt that the chat template writes differently before its answers"
        )


class UnpairedEncoder(_PreferenceEncoder):
    """Rows with an answer and whether it is wanted: one document each."""

    columns = ("prompt", "desirable")

    def render(self, row: dict[str, Any]) -> tuple[list[_Answer], int]:
        unpaired = shapes.unpaired(row, self.source)
        at = next(
            (n for n, m in enumerate(unpaired.messages) if m.get("train") is not False),
            len(unpaired.messages),
        )
        prompt, answer = unpaired.messages[:at], unpaired.messages[at:]
        return [self._answer(prompt, answer, shapes.tools(row))], int(unpaired.label)
