"""Parameters that grow and shrink in training, together with what the optimizer remembers of them.

Rows along the first dimension are kept, in any order, and new ones appended; several parameters at
once. At stage 0 in place; at stages 1 to 3, where weights are cut into shares, by a new DeepSpeed
engine around the same parameter objects and the same optimizer object, so that schedulers, callbacks and
hyper-parameters of groups stay valid. Everything that DeepSpeed counts goes over as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from arctic_like.engine import access, gradients
from arctic_like.engine.divided import is_divided
from arctic_like.engine.layout import shape_of
from arctic_like.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from arctic_like.engine.deepspeed import Engine

# What a new engine takes over from the old one, and a new ZeRO optimizer from its predecessor.
COUNTERS = (
    "global_steps", "global_samples", "micro_steps", "skipped_steps", "training",
    "_global_grad_norm", "_step_applied", "loaded_checkpoint_dp_world_size",
)  # fmt: skip
SCALING = (
    "loss_scaler", "loss_scale_config", "dynamic_loss_scale", "custom_loss_scaler",
    "external_loss_scale", "_global_grad_norm",
)  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """What becomes of a parameter's first dimension.

    keep: rows that stay, with their optimizer states, in this order: int64 indices (a row may be named
    twice) or a bool mask; None: all. new: (count, …) rows to append, any floating dtype.
    moments: state of the new rows by the optimizer's name for it (`exp_avg`, …), zero unless given.
    """

    keep: Tensor | None = None
    new: Tensor | None = None
    moments: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Change:
    """A checked `Rows`: indices as int64, on the host."""

    keep: Tensor
    new: Tensor | None = None
    moments: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, old: Tensor, new: Tensor | None) -> Tensor:
        """The changed tensor; where there are new rows, `new` has their values or None for zeros."""
        import torch

        kept = old.index_select(0, self.keep.to(old.device))
        if self.new is None:
            return kept
        if new is None:
            return torch.cat([kept, kept.new_zeros(self.new.shape)])
        return torch.cat([kept, new.to(kept.device, kept.dtype)])


def resize(engine: Engine, rows: Mapping[str, Rows]) -> None:
    """Change rows of parameters, with their optimizer states and, if it is there, their gradient.

    New rows have no gradient in a step that is under way. Collective; `rows` must be the same on all
    ranks, which is checked. Raises RunError naming the parameter, and the rank that differs.
    """
    error: RunError | None = None
    changes: dict[str, _Change] = {}
    try:
        _expect_whole(engine)
        changes = {name: _check(engine, name, change) for name, change in rows.items()}
        _check_moment(engine)
    except RunError as problem:
        error = problem
    engine.host.raise_together(error)
    _expect_alike(engine, changes)
    _apply(engine, changes)
    engine.resized |= changes.keys()


def match_shapes(engine: Engine, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Give parameters and buffers the shapes of a checkpoint that is about to be loaded. Collective.

    Values are arbitrary afterwards. Returns the names that changed. Raises RunError where a name is
    missing, or dimensions after the first differ: no surgery makes that.
    """
    own = engine.shapes()
    if own.keys() != shapes.keys():
        only = sorted(own.keys() ^ shapes.keys())[:3]
        raise RunError(
            f"other weights than this model's: {', '.join(only)}, … are on one side only"
        )
    different = {name: tuple(shape) for name, shape in shapes.items() if list(shape) != own[name]}
    if different:
        _expect_whole(engine)
    parameters = access.named(engine, None)
    buffers = dict(engine.module.named_buffers())
    changes = {}
    for name, shape in different.items():
        if shape[1:] != tuple(own[name][1:]) or not shape or not own[name]:
            raise RunError(
                f"{name} has the shape {tuple(own[name])} here and {shape} there; "
                "only the first dimension can follow"
            )
        if name in parameters:
            changes[name] = _fit(own[name], shape)
        else:
            buffers[name].data = buffers[name].new_zeros(shape)
    _apply(engine, changes)
    engine.resized |= different.keys()
    return list(different)


def _fit(old: Sequence[int], shape: Sequence[int]) -> _Change:
    import torch

    more = shape[0] - old[0]
    return _Change(
        torch.arange(min(old[0], shape[0])),
        torch.zeros(more, *shape[1:]) if more > 0 else None,
    )


def _expect_whole(engine: Engine) -> None:
    if is_divided(engine.module):
        raise RunError(
            "weights cannot change their shapes while ranks share layers "
            "(deepspeed.tensor_parallel.autotp_size)\n    change them before, or train without it"
        )


def _check(engine: Engine, name: str, rows: Rows) -> _Change:
    """Indices in place of masks; RunError for what does not fit the parameter."""
    import torch

    parameter = access.named(engine, [name])[name]
    shape = shape_of(parameter)
    if not shape:
        raise RunError(f"{name} is a single number and has no rows")
    keep = torch.arange(shape[0]) if rows.keep is None else rows.keep.detach().cpu()
    if keep.dtype == torch.bool:
        if tuple(keep.shape) != shape[:1]:
            raise RunError(f"the mask of {name} has shape {tuple(keep.shape)}, not {shape[:1]}")
        keep = keep.nonzero().squeeze(1)
    if keep.dtype != torch.int64 or keep.ndim != 1:
        raise RunError(
            f"what to keep of {name} is {keep.dtype} of shape {tuple(keep.shape)}; "
            "give int64 indices or a bool mask, in one dimension"
        )
    if keep.numel() and not 0 <= int(keep.min()) <= int(keep.max()) < shape[0]:
        raise RunError(
            f"rows {int(keep.min())} to {int(keep.max())} of {name} shall stay, "
            f"but it has the rows 0 to {shape[0] - 1}"
        )
    count = 0 if rows.new is None else len(rows.new)
    for what, value in {"new rows": rows.new, **rows.moments}.items():
        if value is not None and tuple(value.shape) != (count, *shape[1:]):
            raise RunError(
                f"{what} of {name} have the shape {tuple(value.shape)}; "
                f"it must be {(count, *shape[1:])}"
            )
    strange = sorted(rows.moments.keys() - _state_names(engine, parameter))
    if strange:
        raise RunError(
            f"the optimizer has no {', '.join(strange)} of {name}; "
            f"it has {', '.join(sorted(_state_names(engine, parameter))) or 'no states yet'}"
        )
    if len(keep) + count == 0:
        raise RunError(f"nothing would be left of {name}\n    keep at least one row")
    new = None if not count or rows.new is None else rows.new.detach()
    return _Change(keep, new, dict(rows.moments))


def _check_moment(engine: Engine) -> None:
    if engine.swapped:
        raise RunError("parameters cannot change their shape while other weights stand in for them")
    if engine.gradients_are == "partial":
        raise RunError(
            "parameters cannot change their shape while gradients are half summed\n"
            "    do it after the last micro-batch of a step (on_gradients_ready) or between steps"
        )


def _expect_alike(engine: Engine, changes: Mapping[str, _Change]) -> None:
    own = {name: _digests(change) for name, change in changes.items()}
    everyone = engine.host.gather(own)
    for rank, theirs in enumerate(everyone):
        if list(theirs) != list(everyone[0]):
            raise RunError(
                f"rank {rank} changes {', '.join(theirs) or 'nothing'}, "
                f"rank 0 {', '.join(everyone[0]) or 'nothing'}\n"
                "    all ranks must change the same parameters, in the same order"
            )
        for name, digests in theirs.items():
            what = [w for w, digest in digests.items() if everyone[0][name].get(w) != digest]
            if what or digests.keys() != everyone[0][name].keys():
                raise RunError(
                    f"rank {rank} brings other {', '.join(what) or 'moments'} for {name} than rank 0\n"
                    "    decide on values that all ranks share (gradients() gives such), and draw "
                    "random numbers from a generator of one seed"
                )


def _digests(change: _Change) -> dict[str, str]:
    import torch
    import xxhash

    found = {}
    for what, value in {
        "rows to keep": change.keep,
        "new rows": change.new,
        **change.moments,
    }.items():
        if value is not None:
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found[what] = (
                f"{value.dtype}{tuple(value.shape)}{xxhash.xxh3_128_hexdigest(raw.numpy().tobytes())}"
            )
    return found


def _apply(engine: Engine, changes: Mapping[str, _Change]) -> None:
    import torch

    parameters = access.named(engine, list(changes))
    found = {parameters[name]: change for name, change in changes.items()}
    with torch.no_grad():
        if engine.base_optimizer is None and engine.zero_stage < 3:
            for parameter, change in found.items():
                _replace(parameter, change(parameter.detach(), change.new))
        elif engine.base_optimizer is not None and engine.layout.in_place:
            _in_place(engine, found)
        else:
            _rebuild(engine, found)


def _in_place(engine: Engine, changes: Mapping[nn.Parameter, _Change]) -> None:
    assert engine.base_optimizer is not None
    layout = engine.layout
    planned = []
    for parameter, change in changes.items():
        where = layout.fragments.get(parameter)
        master = layout.flats[where.flat] if where else parameter
        state = engine.base_optimizer.state.get(master, {}) if where else {}
        planned.append((parameter, change, master, state, _elementwise(state, master)))
    for parameter, change, master, state, keys in planned:
        gradient = layout.gradient(parameter)
        if gradient is not None:
            gradient = change(gradient.view(parameter.shape), None)
        for key in keys:
            state[key] = change(state[key], change.moments.get(key))
        values = change(master.detach(), change.new)
        if master is not parameter:
            master.grad = None
            master.data = values
        _replace(parameter, values.to(parameter.dtype))
        parameter.grad = gradient
    engine.forget_layout()


def _rebuild(engine: Engine, changes: Mapping[nn.Parameter, _Change]) -> None:
    """Carry masters, states, gradients and counters through a new engine. Collective.

    Until the new engine stands, every rank has all masters and states in host memory: 4 bytes a
    parameter, and 4 for each moment.
    """
    optimizer = engine.base_optimizer
    weights: dict[str, Tensor] = {}
    states: dict[str, dict[str, Tensor]] = {}
    kept: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
    pending: dict[str, Tensor] | None = None
    trained = {} if optimizer is None else engine.trained(frozen_too=True)
    if optimizer is not None:
        layout = engine.layout
        kept = _group_states(engine)
        if engine.gradients_are == "ready":
            pending = gradients.carried(engine)
        for name, parameter in trained.items():
            change = changes.get(parameter)
            full = access.whole(engine, parameter, layout.flats).cpu()
            weights[name] = full if change is None else change(full, change.new)
            states[name] = {}
            for key in kept[_group(engine, parameter)][0]:
                values = [optimizer.state[flat].get(key, flat) for flat in layout.flats]
                full = access.whole(engine, parameter, values).cpu()
                new = None if change is None else change.moments.get(key)
                states[name][key] = full if change is None else change(full, new)
            if pending and name in pending and change is not None:
                pending[name] = change(pending[name], None)
        del layout
    others = {p: c for p, c in changes.items() if p not in set(trained.values())}
    plain = {p: _changed(engine, p, change) for p, change in others.items()}
    plain |= {trained[name]: weights[name] for name in trained if trained[name] in changes}
    _renew(engine, plain)
    for name, parameter in trained.items():
        access.fill(engine, parameter, engine.layout.flats, weights.pop(name))
    if optimizer is not None:
        _fill_states(engine, kept, states)
    if pending is not None:
        gradients.handed_over(engine, pending)


def _changed(engine: Engine, parameter: nn.Parameter, change: _Change) -> Tensor:
    """An untrained parameter's new values."""
    name = next(n for n, p in engine.module.named_parameters() if p is parameter)
    with access.full_parameters(engine, [name], modify=False) as found:
        return change(found[name].detach(), change.new).clone()


def _renew(engine: Engine, values: Mapping[nn.Parameter, Tensor]) -> None:
    """A new DeepSpeed engine around the same module and optimizer, some parameters with new values."""
    from arctic_like.engine.random_state import preserved

    old, ds_optimizer = engine.engine, engine.engine.optimizer
    counters = {key: getattr(old, key) for key in COUNTERS if hasattr(old, key)}
    scaling = {key: vars(ds_optimizer)[key] for key in SCALING if key in vars(ds_optimizer)}
    device = engine.device
    flags = {parameter: parameter.requires_grad for parameter in engine.module.parameters()}
    engine.close()
    for parameter, value in values.items():
        _replace(parameter, value.to(device, parameter.dtype))
    engine.regroup()
    with preserved():
        engine.open()
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    for key, value in counters.items():
        setattr(engine.engine, key, value)
    for key, value in scaling.items():
        setattr(engine.engine.optimizer, key, value)


def _group_states(engine: Engine) -> dict[int, tuple[dict[str, Any], dict[str, Any]]]:
    """Group → (states with a value per element: name → dtype, all others: name → value)."""
    import torch

    assert engine.base_optimizer is not None
    found: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
    for group, flat in zip(engine.layout.groups, engine.layout.flats, strict=True):
        state = engine.base_optimizer.state.get(flat, {})
        keys = _elementwise(state, flat)
        single = {
            key: value.clone() if torch.is_tensor(value) else value
            for key, value in state.items()
            if key not in keys
        }
        found.setdefault(group, ({key: state[key].dtype for key in keys}, single))
    return found


def _group(engine: Engine, parameter: nn.Parameter) -> int:
    group = engine.group_of(parameter)
    assert group is not None, "only parameters of the optimizer are asked for"
    return group


def _state_names(engine: Engine, parameter: nn.Parameter) -> set[str]:
    """The per-element states of a parameter; empty before the first step."""
    group = engine.group_of(parameter)
    if engine.base_optimizer is None or group is None:
        return set()
    layout = engine.layout
    where = layout.fragments.get(parameter)
    number = where.flat if where else layout.groups.index(group)
    flat = layout.flats[number]
    return set(_elementwise(engine.base_optimizer.state.get(flat, {}), flat))


def _fill_states(
    engine: Engine,
    kept: Mapping[int, tuple[dict[str, Any], dict[str, Any]]],
    states: dict[str, dict[str, Tensor]],
) -> None:
    import torch

    assert engine.base_optimizer is not None
    layout, optimizer = engine.layout, engine.base_optimizer
    for group, flat in zip(layout.groups, layout.flats, strict=True):
        dtypes, single = kept[group]
        if dtypes or single:
            optimizer.state[flat] = {
                key: torch.zeros_like(flat, dtype=dtype, requires_grad=False)
                for key, dtype in dtypes.items()
            }
            for (
                key,
                value,
            ) in single.items():  # each its own: DeepSpeed steps them one after another
                optimizer.state[flat][key] = value.clone() if torch.is_tensor(value) else value
    for name, parameter in engine.trained(frozen_too=True).items():
        for key, full in states.pop(name).items():
            values = [optimizer.state[flat].get(key, flat) for flat in layout.flats]
            access.fill(engine, parameter, values, full)


def _elementwise(state: Mapping[str, Any], master: Tensor) -> list[str]:
    """The states that have a value per element. Raises RunError for one that cannot be cut into rows."""
    import torch

    found = []
    for key, value in state.items():
        if not torch.is_tensor(value) or (value.numel() == 1 and not _like(value, master)):
            continue  # `step` and such
        if not _like(value, master) or not value.is_floating_point():
            raise RunError(
                f"the optimizer keeps {key} as {value.dtype} of shape {tuple(value.shape)} for "
                f"weights of shape {tuple(master.shape)}: not a value per element, so that rows "
                "cannot be changed\n    use an optimizer such as adamw or sgd"
            )
        found.append(key)
    return found


def _like(value: Tensor, master: Tensor) -> bool:
    return value.shape == master.shape and master.ndim > 0


def _replace(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter other data of another shape, whole or to be cut anew by ZeRO-3."""
    import torch

    parameter.grad = None
    # Autograd's node for the parameter knows its shape and outlives a step where anything holds the
    # loss. It is let go where the dtype changes, not where the shape does.
    other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data
    if hasattr(parameter, "ds_id"):
        partitioned: Any = parameter
        partitioned.ds_shape, partitioned.ds_numel = data.shape, data.numel()
        partitioned.ds_tensor = partitioned.ds_secondary_tensor = None
        partitioned.ds_persist = False
        partitioned.ds_status = type(partitioned.ds_status).AVAILABLE
        partitioned.partition()
