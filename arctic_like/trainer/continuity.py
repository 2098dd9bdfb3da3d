"""What changed in the recipe since the checkpoint that a run goes on from, and whether that may be.

A change of what is trained, or of what it is trained on, would make the rest of the run mean something
else: it is refused unless the recipe says `allow_changes: true`. Everything else is said and done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arctic_like.engine.ds_section import TENSOR_PARALLEL
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from arctic_like.data.order import Plan

REFUSED = (
    "type", "seed", "model", "ref_model", "tokenizer", "data", "optimizer.type",
    "optimizer.groups.*.match",
    "deepspeed.zero_optimization.stage", "overfit_first_batch",
    # of further learners, which have names of their own
    "*.model", "*.frozen", "*.optimizer.type", "*.optimizer.groups.*.match",
    "*.deepspeed.zero_optimization.stage",
)  # fmt: skip
HARMLESS = (
    "data.balance", "data.max_tokens_per_batch", "data.source_metrics",
    "data.cache_dir", "data.num_proc", "data.dl_num_workers", "data.eval_sources", "data.test_sources",
    "data.fail_on_missing_cache", "data.use_data_cache", "data.cache_processed_data",
    "model.attn_implementation", "model.disable_activation_checkpoint", "model.save_name",
    "model.activation_checkpointing", "*.model.activation_checkpointing", "tiled_mlp_compute",
    "activation_checkpoint_cpu_offload", "model.compile", "*.model.compile",
    "*.model.attn_implementation", "*.model.disable_activation_checkpoint",
)  # fmt: skip
UNSAID = (
    "output_dir", "overwrite", "allow_changes", "code", "logger", "device", "extends",
    "exit_iteration", "exit_iteration_this_run",
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One key whose stated value differs; `ABSENT` stands for not stated."""

    place: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.place}: {_shown(self.before)} → {_shown(self.after)}"


ABSENT = object()


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """The keys that differ between two recipes as stated, in order; `UNSAID` ones left out."""
    old, new = dict(_leaves(before)), dict(_leaves(after))
    places = [*old, *(place for place in new if place not in old)]
    return [
        Change(place, old.get(place, ABSENT), new.get(place, ABSENT))
        for place in places
        if old.get(place, ABSENT) != new.get(place, ABSENT) and not _within(place, UNSAID)
    ]


def refused(found: list[Change]) -> list[Problem]:
    """Those changes that would make the result meaningless."""
    return [
        Problem(
            f"was {_shown(change.before)} when the checkpoint was saved and is {_shown(change.after)} now",
            place=change.place,
            hint="put it back, start a new run in another output_dir, or set allow_changes: true",
        )
        for change in found
        if _within(change.place, REFUSED) and not _within(change.place, HARMLESS)
    ]


def check_continuity(
    saved: Mapping[str, Any], resolved: Mapping[str, Any], *, allow: bool
) -> list[str]:
    """Sentences on what changed, for the log. Raises RecipeError for what may not change."""
    found = changes(saved["recipe"], resolved)
    problems = refused(found)
    if problems and not allow:
        raise RecipeError(problems)
    return [str(change) for change in found]


def check_division(saved: Mapping[str, Any], *, tensor_parallel_size: int) -> None:
    """Raise RecipeError if a checkpoint of ZeRO 0 has other parts of layers than a rank holds here. From
    stage 1 on it is converted."""
    before = saved.get("tensor_parallel_size", 1)
    if saved["zero_stage"] == 0 and before != tensor_parallel_size:
        raise RecipeError(
            Problem(
                f"was {before} when the checkpoint was saved and is {tensor_parallel_size} now, "
                "and at ZeRO 0 ranks keep their own parts of layers",
                place=TENSOR_PARALLEL,
                hint=f"set it to {before}, or start a new run from the checkpoint's weights "
                "(arctic-train export)",
            )
        )


def check_samples(saved: Mapping[str, Any], *, samples: int, allow: bool) -> None:
    """Raise RecipeError if the training set is not the one whose order the run was following."""
    if saved["samples"] != samples and not allow:
        raise RecipeError(
            Problem(
                f"had {saved['samples']} samples when the checkpoint was saved and has {samples} now: "
                "the files behind it changed, and the run's place in them is lost",
                place="data.sources",
                hint="put the files back, start a new run in another output_dir, "
                "or set allow_changes: true",
            )
        )


def check_batch_size(saved: Mapping[str, Any], plan: Plan) -> None:
    """Raise RecipeError if the global batch size changed and the order of samples depends on it."""
    before, now = saved["global_batch_size"], plan.global_batch_size
    if before != now and getattr(plan, "is_of_one_batch_size", False):
        raise RecipeError(
            Problem(
                f"was {before} when the checkpoint was saved and is {now} now, but with "
                "data.group_by_length an epoch's batches are made for one size",
                place="global_batch_size",
                hint=f"set it to {before}, or start a new run in another output_dir",
            )
        )


def _within(place: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a place is one of `prefixes`, or below one; `*` there is any one word."""
    words = place.split(".")
    return any(
        len(words) >= len(prefix.split("."))
        and all(
            pattern in ("*", word) for pattern, word in zip(prefix.split("."), words, strict=False)
        )
        for prefix in prefixes
    )


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted place and value of everything that is no map; an entry of a list by its number."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{place}.{number}")
    else:
        yield place, value


def _shown(value: Any) -> str:
    return "not stated" if value is ABSENT else repr(value)
