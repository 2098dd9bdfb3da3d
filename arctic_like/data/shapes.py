"""Rows as people have them → conversations, texts, preferences. Strict: what does not fit is an
error. The shapes are drawn in docs/data.md.

A conversation is a list of messages with `role` and `content`, further keys as the chat template
knows them, and `train` where a message says itself what of it is trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arctic_like.data.columns import RowError, kind, list_of_maps, names, optional, value_at
from arctic_like.data.mapping import mapped
from arctic_like.data.messages import ROLES, Message, checked, messages_of, messages_or_text
from arctic_like.data.pairs import split_messages, split_texts

if TYPE_CHECKING:
    from arctic_like.data.base import Shape, SourceConfig

__all__ = [
    "Message", "Pair", "Ranking", "RowError", "Steps", "Unpaired", "conversation", "margin", "pair",
    "ranking", "stepwise", "text", "tokens", "tools", "unpaired",
]  # fmt: skip

_CONVERSATIONS: list[tuple[Shape, tuple[str, ...]]] = [
    ("messages", ("messages",)),
    ("sharegpt", ("conversations",)),
    ("prompt_completion", ("prompt", "completion")),
    ("alpaca", ("instruction", "output")),
    ("question_answer", ("user", "assistant")),
]
"""Shape → the columns that it is known by; the first one that fits."""

_QUESTIONS = (("user", "assistant"), ("question", "answer"), ("question", "response"),
              ("query", "response"), ("problem", "solution"))  # fmt: skip
_WAYS_OUT = (
    "name another column with `column`, map the roles with `role_mapping`, or say the `shape`; "
    "docs/data.md shows them all"
)


@dataclass(frozen=True)
class Pair:
    """A preference: two answers to one prompt. Answers begin and end with the assistant."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


@dataclass(frozen=True)
class Ranking:
    """Several answers to one prompt, the best first. Answers begin and end with the assistant."""

    prompt: list[Message]
    answers: list[list[Message]]


@dataclass(frozen=True)
class Unpaired:
    """A conversation, of which the last turns are the answer (the others have `train: false`), and
    whether the answer is wanted."""

    messages: list[Message]
    label: bool


@dataclass(frozen=True)
class Steps:
    """A solution in steps. prompt: text, or a conversation that ends before the solution. labels: of each
    step, whether it is right."""

    prompt: str | list[Message]
    steps: list[str]
    labels: list[bool]


def conversation(row: dict[str, Any], config: SourceConfig) -> list[Message]:
    """The messages of a row. Raises RowError.

    From `role_mapping`, the column that the recipe names, or the columns of a known shape; of
    `prompt` + `completion` only the completion is trained.
    """
    return checked(_messages(row, config), {*ROLES, *config.role_mapping})


def _messages(row: dict[str, Any], config: SourceConfig) -> list[Message]:
    if config.role_mapping:
        return mapped(row, config)
    shape = _conversation_shape(row, config)
    if shape == "messages":
        name = config.column or "messages"
        return messages_of(value_at(row, name), name, config)
    if shape == "sharegpt":
        name = config.column or "conversations"
        return _with_system(row, messages_of(value_at(row, name), name, config, sharegpt=True))
    if shape == "alpaca":
        return _alpaca(row)
    if shape == "question_answer":
        return _question_answer(row)
    prompt, completion = _prompt(row, config), _answer(row, "completion", config)
    return [{**message, "train": False} for message in prompt] + completion


def _conversation_shape(row: dict[str, Any], config: SourceConfig) -> Shape:
    if config.shape not in ("auto", "messages", *(shape for shape, _ in _CONVERSATIONS)):
        raise RowError(
            f"is read as `shape: {config.shape}`, which is no conversation", hint=_type_of(config)
        )
    if config.shape != "auto":
        return config.shape
    if config.column:
        return "sharegpt" if _speaks_sharegpt(optional(row, config.column)) else "messages"
    shape = next((s for s, columns in _CONVERSATIONS if all(c in row for c in columns)), None)
    if shape == "prompt_completion" and isinstance(row.get("label"), bool):
        raise RowError(
            "has `prompt`, `completion` and a `label`, which may be unwanted",
            hint="train it with `type: kto`; `shape: prompt_completion` leaves the label aside",
        )
    if shape is not None:
        return shape
    known = ["`" + "` and `".join(columns) + "`" for _, columns in _CONVERSATIONS]
    expected = f"expected is {', '.join(known[:-1])}, or {known[-1]}"
    if {"chosen", "rejected"} <= row.keys():
        raise RowError(f"is a preference (`chosen`, `rejected`); {expected}",
                       hint="train preferences with `type: dpo`")  # fmt: skip
    if "input_ids" in row:
        raise RowError(f"is tokenised already (`input_ids`); {expected}",
                       hint="say `process: false` for its source")  # fmt: skip
    if isinstance(row.get("text"), str):
        raise RowError(f"has a `text`, which is no conversation; {expected}",
                       hint="train texts with `type: causal`")  # fmt: skip
    raise RowError(f"has the columns {names(row)}; {expected}", hint=_WAYS_OUT)


def _type_of(config: SourceConfig) -> str:
    wanted = {"text": "causal", "preference": "dpo", "unpaired": "kto"}.get(config.shape)
    return f"train it with `type: {wanted}`, or leave `shape` out" if wanted else _WAYS_OUT


def _speaks_sharegpt(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict)
        and "from" in value[0] and "role" not in value[0]
    )  # fmt: skip


def _with_system(row: dict[str, Any], messages: list[Message]) -> list[Message]:
    """With the column `system` in front, where the turns do not begin with one."""
    system = row.get("system")
    if not system or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _alpaca(row: dict[str, Any]) -> list[Message]:
    """`instruction` and `input` are the question, one below the other; `history` holds earlier
    questions and answers."""
    messages: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowError(f"has {kind(history)} in 'history'; expected is a list of turns")
    for number, turn in enumerate(history, 1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowError(
                f"has {kind(turn)} as turn {number} of 'history'; expected is [question, answer]"
            )
        messages += [
            {"role": "user", "content": turn[0]},
            {"role": "assistant", "content": turn[1]},
        ]
    question, more = value_at(row, "instruction"), row.get("input")
    if more:
        if not isinstance(more, str) or not isinstance(question, str):
            raise RowError(f"has {kind(more)} in 'input'; expected is text")
        question = f"{question}\n{more}" if question else more
    messages += [
        {"role": "user", "content": question},
        {"role": "assistant", "content": value_at(row, "output")},
    ]
    return _with_system(row, messages)


def _question_answer(row: dict[str, Any]) -> list[Message]:
    for question, answer in _QUESTIONS:
        if question in row and answer in row:
            return _with_system(row, [
                {"role": "user", "content": row[question]},
                {"role": "assistant", "content": row[answer]},
            ])  # fmt: skip
    raise RowError(
        f"has the columns {names(row)}; expected is a question and its answer",
        hint="say which they are: `role_mapping: {user: …, assistant: …}`",
    )


def text(row: dict[str, Any], config: SourceConfig) -> str:
    """The text of a row: the column that the recipe names, `text`, or the only one. Raises
    RowError."""
    if config.shape not in ("auto", "text"):
        raise RowError(f"is read as `shape: {config.shape}`, which is no text",
                       hint="train conversations with `type: sft`; or leave `shape` out")  # fmt: skip
    name = config.column or ("text" if "text" in row or len(row) != 1 else next(iter(row)))
    if name == "text" and not config.column and "text" not in row:
        raise RowError(
            f"has the columns {names(row)}; expected is `text`", hint=_text_ways_out(row)
        )
    value = value_at(row, name)
    if not isinstance(value, str):
        hint = _text_ways_out(row) if isinstance(value, list) else ""
        raise RowError(f"has {kind(value)} in {name!r}; expected is text", hint=hint)
    return value


def _text_ways_out(row: dict[str, Any]) -> str:
    if {"chosen", "rejected"} <= row.keys():
        return "train preferences with `type: dpo`"
    if any(all(c in row for c in columns) for _, columns in _CONVERSATIONS):
        return "train conversations with `type: sft`, or name a column of text with `column`"
    return "name another column with `column`, or write it as a template: `{{ title }} {{ body }}`"


def tools(row: dict[str, Any]) -> list[Any] | None:
    """The tools that a conversation may call: the column `tools`, a list or its JSON. Raises
    RowError."""
    value = row.get("tools")
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return None
    return list_of_maps(value, "tools", "a list of tools") or None


def pair(row: dict[str, Any], config: SourceConfig) -> Pair:
    """The preference of a row. Raises RowError.

    `chosen` and `rejected` are answers to `prompt`, or whole conversations, of which the prompt is
    what they have in common. `role_mapping` may say where `prompt` (or `user`), `system`, `chosen`
    and `rejected` stand.
    """
    _expect(row, config, ("chosen", "rejected"), "preference")
    chosen, rejected = (_answer(row, name, config) for name in ("chosen", "rejected"))
    prompt = _prompt(row, config, needed=False)
    whole = chosen[:1] and rejected[:1] and chosen[0]["role"] != "assistant"
    if whole:
        stated = prompt
        prompt, chosen, rejected = split_messages(chosen, rejected)
        _agree(stated, prompt)
    elif not prompt:
        texts = [_stated(row, name, config) for name in ("chosen", "rejected")]
        if not all(isinstance(one, str) for one in texts):
            raise RowError("has no 'prompt', and answers alone in 'chosen' and 'rejected'",
                           hint=_MAP_PROMPT)  # fmt: skip
        prompt, chosen, rejected = split_texts(*texts)
    if not prompt:
        raise RowError(
            "has no prompt: 'chosen' and 'rejected' begin with answers", hint=_MAP_PROMPT
        )
    system = _system(row, config)
    return Pair(
        checked(system + prompt),
        _checked_answer(chosen, "chosen"),
        _checked_answer(rejected, "rejected"),
    )


def stepwise(row: dict[str, Any], config: SourceConfig) -> Steps:
    """The solution of a row: `prompt`, `completions` (its steps) and `labels`. Raises RowError."""
    if config.shape != "auto":
        raise RowError(f"is read as `shape: {config.shape}`, which has no steps",
                       hint="leave `shape` out")  # fmt: skip
    missing = [name for name in ("prompt", "completions", "labels")
               if name not in row and name not in config.role_mapping]  # fmt: skip
    if missing:
        raise RowError(
            f"has the columns {names(row)}; expected is `prompt`, `completions`, `labels`",
            hint=f"say which they are: `role_mapping: {{{missing[0]}: …}}`",
        )
    steps, labels = (_stated(row, name, config) for name in ("completions", "labels"))
    if not isinstance(steps, list) or not steps or any(type(one) is not str for one in steps):
        raise RowError(
            f"has {kind(steps)} in 'completions'; expected is a list of texts, the steps"
        )
    if not isinstance(labels, list) or any(one not in (True, False) for one in labels):
        raise RowError(f"has {kind(labels)} in 'labels'; expected is a list of true and false")
    if len(steps) != len(labels):
        raise RowError(
            f"has {len(steps)} steps and {len(labels)} labels; expected is one for each step"
        )
    prompt = _stated(row, "prompt", config)
    if not isinstance(prompt, str):
        prompt = checked(_prompt(row, config))
    return Steps(prompt, steps, [bool(one) for one in labels])


def margin(row: dict[str, Any], config: SourceConfig) -> float:
    """By how much the chosen answer was judged better: the column `margin`. Raises RowError."""
    value = _stated(row, "margin", config)
    if not _is_number(value):
        raise RowError(f"has {kind(value)} in 'margin'; expected is a finite number",
                       hint="set data.margin to false, or give every pair its margin")  # fmt: skip
    return float(value)


def ranking(row: dict[str, Any], config: SourceConfig) -> Ranking:
    """The ranking of a row: `prompt` and `answers`, the best first unless `ranks` (1 is the best) or `scores`
    (the highest is) say otherwise. Raises RowError, also where two answers are as good as each other."""
    if config.shape != "auto":
        raise RowError(f"is read as `shape: {config.shape}`, which is no ranking",
                       hint="leave `shape` out")  # fmt: skip
    for name in ("prompt", "answers"):
        if name not in row and name not in config.role_mapping:
            raise RowError(f"has the columns {names(row)}; expected is `prompt`, `answers`",
                           hint=f"say which they are: `role_mapping: {{{name}: …}}`")  # fmt: skip
    values = _stated(row, "answers", config)
    if not isinstance(values, list) or len(values) < 2:
        raise RowError(
            f"has {kind(values)} in 'answers'; expected is a list of two answers or more"
        )
    answers = [
        _checked_answer(messages_or_text(one, "answers", "assistant", config), "answers")
        for one in values
    ]
    prompt = checked(_system(row, config) + _prompt(row, config))
    return Ranking(prompt, [answers[place] for place in _best_first(row, len(answers), config)])


def _best_first(row: dict[str, Any], count: int, config: SourceConfig) -> list[int]:
    """The places of a row's answers in the order of preference."""
    stated = [name for name in ("ranks", "scores") if name in row or name in config.role_mapping]
    if not stated:
        return list(range(count))
    if len(stated) > 1:
        raise RowError("has 'ranks' and 'scores'", hint="keep one of them")
    (name,) = stated
    values = _stated(row, name, config)
    if not isinstance(values, list) or len(values) != count or not all(map(_is_number, values)):
        raise RowError(
            f"has {kind(values)} in {name!r}; expected are {count} numbers, one an answer"
        )
    if len(set(values)) < count:
        raise RowError(
            f"has answers as good as each other in {name!r} ({values}); expected is a strict order",
            hint="leave out one of them, or set data.on_bad_sample: skip",
        )
    return sorted(range(count), key=values.__getitem__, reverse=name == "scores")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_MAP_PROMPT = "add the column `prompt`, or map it with `role_mapping: {prompt: …}`"


def unpaired(row: dict[str, Any], config: SourceConfig) -> Unpaired:
    """The judged answer of a row: `prompt`, `completion` and `label`. Raises RowError.

    Without a prompt, `completion` (or `messages`) is a whole conversation, of which the last turns
    of the assistant are the answer.
    """
    whole = "messages" in row and "completion" not in row and not config.role_mapping
    _expect(row, config, ("messages" if whole else "completion", "label"), "unpaired")
    label = _stated(row, "label", config)
    if label not in (True, False):  # 0 and 1 too
        raise RowError(f"has {kind(label)} in 'label'; expected is true or false")
    answer = _answer(row, "messages" if whole else "completion", config)
    prompt = _system(row, config) + _prompt(row, config, needed=False)
    if not prompt:
        start = max((n for n, m in enumerate(answer, 1) if m["role"] != "assistant"), default=0)
        prompt, answer = answer[:start], answer[start:]
    if not prompt:
        raise RowError("has no prompt: 'completion' begins with the answer", hint=_MAP_PROMPT)
    messages = [{**message, "train": False} for message in checked(prompt)]
    return Unpaired(messages + _checked_answer(answer, "completion"), bool(label))


def _expect(
    row: dict[str, Any], config: SourceConfig, columns: tuple[str, ...], shape: Shape
) -> None:
    if config.shape not in ("auto", shape):
        raise RowError(f"is read as `shape: {config.shape}`; expected is `{shape}`",
                       hint="leave `shape` out, or train it with `type: sft`")  # fmt: skip
    if all(name in row or name in config.role_mapping for name in columns):
        return
    others = {"preference": ("completion", "label"), "unpaired": ("chosen", "rejected")}[shape]
    hint = _WAYS_OUT
    if all(name in row for name in others):
        hint = f"train it with `type: {'kto' if shape == 'preference' else 'dpo'}`"
    expected = ", ".join(f"`{name}`" for name in ("prompt", *columns))
    raise RowError(f"has the columns {names(row)}; expected is {expected}", hint=hint)


def _stated(row: dict[str, Any], name: str, config: SourceConfig) -> Any:
    return value_at(row, config.role_mapping.get(name, name))


def _prompt(row: dict[str, Any], config: SourceConfig, *, needed: bool = True) -> list[Message]:
    mapping = config.role_mapping
    path = mapping.get("prompt") or mapping.get("user") or "prompt"
    value = (
        optional(row, path) if not needed and path not in mapping.values() else value_at(row, path)
    )
    return [] if value is None and not needed else messages_or_text(value, path, "user", config)


def _answer(row: dict[str, Any], name: str, config: SourceConfig) -> list[Message]:
    return messages_or_text(_stated(row, name, config), name, "assistant", config)


def _system(row: dict[str, Any], config: SourceConfig) -> list[Message]:
    path = config.role_mapping.get("system")
    value = optional(row, path) if path else None
    return [{"role": "system", "content": value}] if value else []


def _checked_answer(messages: list[Message], name: str) -> list[Message]:
    if not messages:
        raise RowError(f"has no answer in {name!r}; expected is a turn of the assistant")
    messages = checked(messages)
    for place, message in (("begins", messages[0]), ("ends", messages[-1])):
        if message["role"] != "assistant":
            raise RowError(
                f"has an answer in {name!r} that {place} with a turn of the {message['role']}; "
                "expected is the assistant"
            )
    return messages


def _agree(stated: list[Message], found: list[Message]) -> None:
    """Raise RowError where `prompt` says otherwise than the conversations begin."""
    said = [str(message.get("content")).strip() for message in found]
    for message in stated:
        if str(message.get("content")).strip() not in said:
            raise RowError(
                "has a 'prompt' that is not among the messages with which 'chosen' and 'rejected' "
                f"begin: {kind(message.get('content'))}",
                hint="leave the prompt out, or keep only the answers in `chosen` and `rejected`",
            )


def tokens(row: dict[str, Any]) -> tuple[Sequence[int], Sequence[bool]]:
    """`input_ids` of a row that is tokenised already, and which are trained. Raises RowError."""
    ids = value_at(row, "input_ids")
    if not _whole_numbers(ids):
        raise RowError("has no list of whole numbers in 'input_ids'")
    labels = row.get("labels")
    if labels is None:
        return ids, [True] * len(ids)
    if not _whole_numbers(labels) or len(labels) != len(ids):
        raise RowError("has 'labels' that are not as many whole numbers as 'input_ids'")
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (-100, token):
            raise RowError(
                f"has the label {label} at the token {token} (number {place}); expected is the "
                "token itself, or -100 where it is not trained"
            )
    return ids, [label != -100 for label in labels]


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)
