"""What adapters are put on besides language models: models that score, classify or embed.

Such a model has layers that its base does not bring, a head above all. They are trained whole beside the
adapter and lie in its folder (peft's `modules_to_save`), so base and folder together are the whole model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

CAUSAL = "CAUSAL_LM"
AUTO_CLASSES = {
    CAUSAL: "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""peft's type of task → the name of transformers' class that makes its model."""
_ARCHITECTURES = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
_OF_PEFT = frozenset({"classifier", "score"})
"""Heads that peft itself adds to `modules_to_save` of a classifier, whether the model has them or not."""


def auto_class(task: str | None) -> Any:
    """transformers' class for a task of peft; of a language model where none is stated."""
    import transformers

    return getattr(transformers, AUTO_CLASSES.get(task or CAUSAL, AUTO_CLASSES[CAUSAL]))


def task_of(architectures: Sequence[str] | None) -> str:
    """The task of a model whose config names these classes, `LlamaForSequenceClassification` say."""
    name = (architectures or [""])[0]
    for end, task in _ARCHITECTURES.items():
        if name.endswith(end):
            return task
    embeds = name.endswith("Model") and not name.endswith(("HeadModel", "HeadsModel"))
    return "FEATURE_EXTRACTION" if embeds else CAUSAL


def trained_whole(model: Any, task: str, drawn: Collection[str]) -> list[str]:
    """Names of the modules that an adapter for this task has to bring: what stands beside the body, and
    modules in it whose weights were drawn rather than read.

    drawn: names of such parameters.
    """
    if task == CAUSAL:
        return []
    body = model.base_model_prefix
    if not hasattr(model, body):  # the model is the body
        return []
    beside = [
        name
        for name, part in model.named_children()
        if name != body and next(part.parameters(), None) is not None
    ]
    within = [name.rpartition(".")[0] for name in drawn if name.partition(".")[0] == body]
    return [*beside, *dict.fromkeys(within)]


def existing(model: nn.Module, stated: Collection[str]) -> list[str]:
    """`modules_to_save` without the heads that peft names of itself and the model does not have."""
    names = [name for name, _ in model.named_modules()]
    kept = [
        one for one in stated if one not in _OF_PEFT or any(name.endswith(one) for name in names)
    ]
    return list(dict.fromkeys(kept))


def replaced(model: nn.Module, stated: Collection[str] | None) -> frozenset[str]:
    """The names of parameters in whose place an adapter brings its own, by peft's rule for
    `modules_to_save`: a module's name ends so."""
    ends = tuple(stated or ())
    if not ends:
        return frozenset()
    return frozenset(
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if name.endswith(ends)
        for parameter, _ in module.named_parameters()
    )


def labels_of(model: Any, task: str) -> dict[str, Any]:
    """What a head's labels are, for the folder of an adapter; empty without a head."""
    if task not in ("SEQ_CLS", "TOKEN_CLS"):
        return {}
    return {"labels": [model.config.id2label[number] for number in sorted(model.config.id2label)]}


def with_labels(about: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` for a model with the labels that a folder states."""
    names = about.get("labels")
    if not names:
        return {}
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }
