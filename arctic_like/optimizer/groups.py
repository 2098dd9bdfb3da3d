"""Which parameters are updated together: by the recipe's patterns, with and without weight decay."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from torch import nn

    from arctic_like.optimizer.base import GroupConfig

GROUP = "group_name"
"""Key of a torch parameter group that says which of the recipe's groups it belongs to; the default
group's is empty. (`name` has a meaning of its own in DeepSpeed.)"""

SHOWN = 8
"""How many parameter names an error shows."""


@dataclass
class _Members:
    """The parameters of one group of the recipe."""

    decayed: list[nn.Parameter] = field(default_factory=list)
    plain: list[nn.Parameter] = field(default_factory=list)


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float | None,
    groups: Sequence[GroupConfig] = (),
) -> list[dict[str, Any]]:
    """The trainable parameters as torch's parameter groups: default group first, then the recipe's.

    Each is up to two: with and without weight decay. Without: biases, norms, and every other
    parameter of less than two dimensions. A parameter belongs to the first of `groups` whose pattern
    is found in its name; a shared one counts once, and may be found by any of its names.
    The same groups in the same order at every ZeRO stage: ZeRO-3 leaves an empty shard in a
    parameter's place, so its shape is read from `ds_shape` there.

    weight_decay: of the groups that state none; None where the optimizer knows no weight decay.
    Raises RecipeError for a group without a parameter, showing some names.
    """
    trained = [(names, p) for names, p in _named(model) if p.requires_grad]
    members: list[_Members] = [_Members() for _ in (None, *groups)]
    patterns = [re.compile(group.match) for group in groups]
    exempt = _norm_parameters(model)
    for names, parameter in trained:
        first = next((i for i, pattern in enumerate(patterns, 1) if _found(pattern, names)), 0)
        spared = parameter in exempt or not _decays(names[0], parameter)
        (members[first].plain if spared else members[first].decayed).append(parameter)
    problems = [
        _matches_nothing(model, group, number, trained)
        for number, group in enumerate(groups)
        if not (members[number + 1].decayed or members[number + 1].plain)
    ]
    if problems:
        raise RecipeError(problems)
    found = [*_torch_groups(members[0], "", {}, weight_decay)]
    for group, its in zip(groups, members[1:], strict=True):
        values = group.stated()
        if "learning_rate" in values:
            values["lr"] = values.pop("learning_rate")
        decay = values.pop("weight_decay", weight_decay)
        found += _torch_groups(its, group.label, values, decay)
    return found


def _torch_groups(
    members: _Members, label: str, values: dict[str, Any], weight_decay: float | None
) -> Iterator[dict[str, Any]]:
    if weight_decay is None:
        everything = [*members.decayed, *members.plain]
        if everything:
            yield {"params": everything, GROUP: label, **values}
        return
    for parameters, decay in ((members.decayed, weight_decay), (members.plain, 0.0)):
        if parameters:
            yield {"params": parameters, GROUP: label, **values, "weight_decay": decay}


def _named(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Every parameter once, in the model's order, with all its names."""
    found: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), ([], parameter))[0].append(name)
    return list(found.values())


def _found(pattern: re.Pattern[str], names: list[str]) -> bool:
    return any(pattern.search(name) for name in names)


def _matches_nothing(
    model: nn.Module, group: GroupConfig, number: int, trained: list[tuple[list[str], nn.Parameter]]
) -> Problem:
    pattern, place = re.compile(group.match), f"optimizer.groups.{number}.match"
    mine = [names[0] for names, _ in trained if _found(pattern, names)]
    if mine:
        return Problem(
            f"is {group.match!r}, but earlier groups have all {len(mine)} parameters that it "
            f"matches ({_some(mine)})",
            place,
            "put it before them, or remove it",
        )
    frozen = [name for name, _ in model.named_parameters() if pattern.search(name)]
    if frozen:
        return Problem(
            f"is {group.match!r}, which matches frozen parameters only ({_some(frozen)})",
            place,
            "remove it, or train them",
        )
    known = _some([names[0] for names, _ in trained])
    return Problem(
        f"is {group.match!r}, which no parameter's name contains", place, f"there are {known}"
    )


def _some(names: list[str]) -> str:
    """A few names, spread over the whole list."""
    if len(names) <= SHOWN:
        return ", ".join(names)
    spread = [names[i * (len(names) - 1) // (SHOWN - 1)] for i in range(SHOWN)]
    return f"{', '.join(dict.fromkeys(spread))}, … ({len(names)} in all)"


def _decays(name: str, parameter: nn.Parameter) -> bool:
    # A mixture of experts stacks biases into matrices (`gate_up_proj_bias`): the name goes first.
    leaf = name.rpartition(".")[2].lower()
    return not leaf.endswith("bias") and len(getattr(parameter, "ds_shape", parameter.shape)) >= 2


def _norm_parameters(model: nn.Module) -> set[nn.Parameter]:
    norms = (module for module in model.modules() if "norm" in type(module).__name__.lower())
    return {parameter for norm in norms for parameter in norm.parameters(recurse=False)}
