"""A frozen model with an adapter, made by peft: the same at every ZeRO stage and number of ranks."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.errors import Problem, RecipeError
from arctic_like.model.adapters import fingerprint, targets, tasks
from arctic_like.model.adapters.config import PROMPTS, arguments, kind_of
from arctic_like.model.adapters.quantised import check_bitsandbytes
from arctic_like.model.adapters.vocabulary import grow
from arctic_like.model.loading import zero3_for_transformers
from arctic_like.model.randomness import seed_by_name, untouched_randomness

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

NAME = "default"
"""peft's name of the one adapter."""
BASE = "adapter_base"
"""Attribute of a model with an adapter: what is known of its base, to be written beside the adapter."""
CONFIG_PLACE, FOLDER_PLACE = "model.peft_config", "model.adapter"
_CHANGE_THE_BASE = ("pissa", "olora", "loftq")


def is_adapted(model: Any) -> bool:
    """Whether a model was made here: frozen weights that its recipe brings back, and an adapter."""
    return BASE in vars(model)


def from_recipe(
    base: PreTrainedModel,
    config: Mapping[str, Any],
    *,
    about: Mapping[str, Any],
    seed: int,
    zero: dict[str, Any] | None,
    dtype: torch.dtype | None = None,
    rows: int = 0,
    task: str = tasks.CAUSAL,
    drawn: Collection[str] = (),
) -> Any:
    """`base`, frozen, with a new adapter of peft's config as the recipe states it. Collective at ZeRO-3.

    about: what is known of the base. seed: initial weights depend on it and on the modules' names only.
    zero: the DeepSpeed dictionary where `base` is partitioned (ZeRO-3). dtype: the adapter's, the base's
    unless given. rows: the tokenizer's size; where the base has fewer, its embeddings grow. task: peft's
    type of it. drawn: names of parameters that the base's checkpoint did not bring. Raises RecipeError for
    a config that does not fit.
    """
    peft = import_peft()
    if str(config.get("init_lora_weights")).lower() == "loftq":
        check_bitsandbytes("LoftQ", place=f"{CONFIG_PLACE}.init_lora_weights")
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind_of(config)]
    try:
        made = kind(**arguments(config, task))
    except (TypeError, ValueError) as error:
        raise RecipeError(Problem(f"peft refuses it: {error}", CONFIG_PLACE)) from error
    if problems := targets.misplaced(base, made, place=CONFIG_PLACE):
        raise RecipeError(problems)
    if brought := tasks.trained_whole(base, task, drawn):
        made.modules_to_save = list(dict.fromkeys([*(made.modules_to_save or ()), *brought]))
    found = _fingerprint(base, made)
    if rows > base.config.get_text_config().vocab_size:
        grow(base, rows)
    return _wrap(
        base, made, about, seed=seed, zero=zero, dtype=dtype, place=CONFIG_PLACE, found=found
    )


def from_folder(
    base: PreTrainedModel,
    folder: Path,
    *,
    about: Mapping[str, Any],
    zero: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    place: str = FOLDER_PLACE,
    task: str = tasks.CAUSAL,
) -> Any:
    """`base`, frozen, with the adapter that peft or an export wrote to `folder`, trainable. As above.

    Raises RecipeError where it is no adapter, one of another architecture, or of another base.
    """
    peft = import_peft()
    if not (folder / "adapter_config.json").is_file():
        raise RecipeError(
            Problem(f"is {str(folder)!r}, which has no adapter_config.json", place,
                    "give a folder that peft's save_pretrained or an export has written")
        )  # fmt: skip
    config = peft.PeftConfig.from_pretrained(str(folder))
    _check_task(folder, config, task, place)
    config.inference_mode, config.task_type = False, task
    if task != tasks.CAUSAL:
        config.modules_to_save = tasks.existing(base, config.modules_to_save or ())
    config.base_model_name_or_path = None  # peft would warn of a base that lies elsewhere now
    if getattr(config, "prefix_projection", False):
        config.prefix_projection = False  # files hold the prefix that the projection made
    found = _fingerprint(base, config)
    said = fingerprint.read(folder)
    if said is not None:
        if problem := fingerprint.difference(said["fingerprint"], found):
            raise RecipeError(_other_base(folder, said, problem, place))
        if said.get("vocab_size", 0) > base.config.get_text_config().vocab_size:
            grow(base, said["vocab_size"])
    if wanted := targets.foreign(base, config):
        raise RecipeError(_other_architecture(base, folder, f"has no {wanted}", place))
    model = _wrap(base, config, about, seed=0, zero=zero, dtype=dtype, place=place, found=found)
    _fill(model, folder, place)
    return model


def import_peft() -> Any:
    """peft itself. Raises RecipeError, naming the way out, where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise RecipeError(
            Problem(
                f"adapters need peft, which cannot be imported ({error})",
                CONFIG_PLACE,
                "pip install 'arctic-like[peft]'",
            )
        ) from error
    return peft


def _wrap(
    base: PreTrainedModel,
    config: Any,
    about: Mapping[str, Any],
    *,
    seed: int,
    zero: dict[str, Any] | None,
    dtype: torch.dtype | None,
    place: str,
    found: dict[str, Any],
) -> Any:
    import peft

    starts = str(getattr(config, "init_lora_weights", "")).lower()
    changed = next((name for name in _CHANGE_THE_BASE if starts.startswith(name)), "")
    tuner = peft.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    with untouched_randomness(), ExitStack() as stack:
        if zero is not None:
            stack.enter_context(zero3_for_transformers(zero))
        stack.enter_context(_drawn_by_name(tuner, seed))
        stack.enter_context(warnings.catch_warnings())
        # Tied ends are said by vocabulary.py; peft sets GPT-2's layout itself.
        warnings.filterwarnings(
            "ignore", message=".*(fan_in_fan_out|ensure_weight_tying|is_gradient_checkpointing).*"
        )
        seed_by_name(seed, "adapter")
        try:
            model: Any = peft.get_peft_model(base, config, NAME, autocast_adapter_dtype=False)
        except (ValueError, TypeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            hint = f"there are {', '.join(targets.candidates(base))}; or all-linear"
            raise RecipeError(
                Problem(
                    f"peft cannot put it on this {base.config.model_type}: {reason}", place, hint
                )
            ) from error
    if config.task_type != tasks.CAUSAL:  # peft adds names of heads that others have
        config.modules_to_save = tasks.existing(base, config.modules_to_save or ())
    _set_dtype(model, dtype)
    if config.is_prompt_learning and str(config.peft_type.value) != "PREFIX_TUNING":
        model.register_forward_hook(_without_virtual_tokens)
    vocabulary = base.config.get_text_config().vocab_size
    about = {**about, "changed_by": changed, "vocab_size": vocabulary, "fingerprint": found}
    setattr(model, BASE, about)
    return model


@contextmanager
def _drawn_by_name(tuner: type, seed: int) -> Iterator[None]:
    """Inside, what peft draws for a module depends on the seed and the module's name only.

    Starts that change the base weight leave the matrices that they took from it, unrounded, as `start`
    on the layer: an export subtracts them (`convert.py`).
    """
    from peft.tuners.lora import LoraLayer

    patched: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, new: Any) -> None:
        patched.append((owner, name, owner.__dict__[name]))
        setattr(owner, name, new)

    if "_create_and_replace" in tuner.__dict__:
        create = tuner.__dict__["_create_and_replace"]

        def by_name(self: Any, *args: Any, current_key: str, **kwargs: Any) -> Any:
            seed_by_name(seed, f"adapter.{current_key}")
            return create(self, *args, current_key=current_key, **kwargs)

        replace(tuner, "_create_and_replace", by_name)
    for name in ("pissa_init", "olora_init"):
        own = LoraLayer.__dict__[name]

        def kept(self: Any, adapter: str, *args: Any, own: Any = own) -> None:
            own(self, adapter, *args)
            pair = (self.lora_A[adapter].weight, self.lora_B[adapter].weight)
            self.start = tuple(matrix.detach().float().cpu().clone() for matrix in pair)

        replace(LoraLayer, name, kept)
    try:
        yield
    finally:
        for owner, name, own in reversed(patched):
            setattr(owner, name, own)


def _fill(model: Any, folder: Path, place: str) -> None:
    """Give the adapter the values that lie in the folder."""
    import peft

    base = model.get_base_model()
    weights = peft.utils.save_and_load.load_peft_weights(str(folder), device="cpu")
    try:
        result = peft.set_peft_model_state_dict(model, dict(weights), adapter_name=NAME)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(_other_architecture(base, folder, reason, place)) from error
    if model.active_peft_config.is_prompt_learning:  # one tensor, which peft has filled in strictly
        return
    own = {name for name, _ in adapter_weights(model)}
    missing = sorted(own & set(result.missing_keys))
    if missing or result.unexpected_keys:
        what = [
            f"its adapter would have {missing[0]}" if missing else "",
            f"there is {result.unexpected_keys[0]} besides" if result.unexpected_keys else "",
        ]
        reason = " and ".join(part for part in what if part)
        raise RecipeError(_other_architecture(base, folder, reason, place))


def adapter_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of what belongs to the adapter: its own weights, and base weights it trains.
    Shared ones come under each name."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if NAME in name.split(".") or parameter.requires_grad:
            yield name, parameter


def summary(model: Any) -> str:
    """A line: how many weights are trained, of how many."""
    count = {True: 0, False: 0}
    for parameter in model.parameters():
        count[parameter.requires_grad] += int(getattr(parameter, "ds_numel", parameter.numel()))
    total = sum(count.values())
    kind = model.peft_config[NAME].peft_type.value
    share = f"{100 * count[True] / total:.3g} %"
    return f"adapter {kind}: {count[True]:,} of {total:,} weights are trained ({share})"


def is_prompt(model: Any) -> bool:
    """Whether a model has virtual tokens in front of every row."""
    if not is_adapted(model):
        return False
    return model.peft_config[NAME].peft_type.value in PROMPTS


def _fingerprint(base: Any, config: Any) -> dict[str, Any]:
    """Of the base, under a head that the adapter brings: without what stands in the head's place."""
    brings = config.modules_to_save if config.task_type != tasks.CAUSAL else ()
    return fingerprint.fingerprint(base, without=tasks.replaced(base, brings))


def _check_task(folder: Path, config: Any, task: str, place: str) -> None:
    """Raise RecipeError for an adapter of another kind of model, or one that this kind cannot have."""
    stated = getattr(config.task_type, "value", config.task_type) or task
    if stated != task:
        raise RecipeError(
            Problem(
                f"is {str(folder)!r}, an adapter for {stated}, and this model's task is {task}: it has "
                "not the head that would be trained on",
                place,
                "merge it into its base (arctic-train merge), and name the merged model",
            )
        )
    if task != tasks.CAUSAL and config.is_prompt_learning:
        raise RecipeError(
            Problem(f"is {str(folder)!r}, virtual tokens, which would stand before the texts that are "
                    "scored", place, "take an adapter of type lora, oft or ia3")
        )  # fmt: skip


def _set_dtype(model: Any, dtype: torch.dtype | None) -> None:
    """DeepSpeed needs one dtype of all weights, in low precision: the base's, unless told otherwise."""
    base = model.get_base_model()
    own = base.dtype
    wanted = dtype or own
    for _, parameter in adapter_weights(model):
        if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(wanted)
    if wanted == own:
        return
    heads = {name for name, _ in base.named_children() if name != base.base_model_prefix}
    for name, module in base.named_modules():
        whole = getattr(module, "modules_to_save", None)
        if (
            whole is not None and NAME in whole
        ):  # an adapter's matrices are cast by peft, these are not
            _cast_around(whole[NAME], inside=wanted, outside=None if name in heads else own)


def _cast_around(module: nn.Module, *, inside: torch.dtype, outside: torch.dtype | None) -> None:
    """Let a module take what it is given in its own dtype, and give back `outside`, or its own."""

    def before(_: Any, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            one.to(inside) if hasattr(one, "is_floating_point") and one.is_floating_point() else one
            for one in values
        )

    def after(_: Any, __: Any, output: Any) -> Any:
        return output.to(outside)

    module.register_forward_pre_hook(before)
    if outside is not None:
        module.register_forward_hook(after)


def _without_virtual_tokens(module: Any, _: Any, output: Any) -> Any:
    """Let the logits be those of the row's own tokens, which the labels belong to."""
    output.logits = output.logits[:, module.peft_config[NAME].num_virtual_tokens :]
    return output


def _other_base(folder: Path, said: Mapping[str, Any], reason: str, place: str) -> Problem:
    name = said.get("name_or_path") or "a model with random weights"
    return Problem(
        f"is {str(folder)!r}, an adapter of another base ({name}): this model is not it, {reason}",
        place,
        "name the base that it was trained on",
    )


def _other_architecture(base: Any, folder: Path, reason: str, place: str) -> Problem:
    return Problem(
        f"is {str(folder)!r}, an adapter for another architecture: this {base.config.model_type} "
        f"{reason}",
        place,
        "name the base that it was trained on",
    )
