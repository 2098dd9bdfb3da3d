"""One DeepSpeed engine behind six verbs: begin · backward · step · save · load · destroy.

Knows DeepSpeed's habits so that the loop need not: who divides by what, where the gradient norm
is to be found at each ZeRO stage, and when an update was skipped. Knows no data and no recipe.
What is asked of weights and gradients beyond a step lies in `gradients`, `access` and `surgery`.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from arctic_like.engine import access, divided, frozen_base, gradients, surgery, thrift, traces
from arctic_like.engine.held import held
from arctic_like.engine.host import HostGroup
from arctic_like.engine.idle_parameters import settle
from arctic_like.engine.layout import Layout, layout_of, training_device
from arctic_like.engine.reserve import reserved_states
from arctic_like.engine.snapshot import Apart, Capture, CapturedFile
from arctic_like.errors import CheckpointError, RunError
from arctic_like.world import World

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

HYPER_PARAMETERS = ("lr", "initial_lr", "betas", "eps", "weight_decay", "momentum")
SHAPES = "shapes.json"
"""Beside DeepSpeed's files: the shape of every weight, and which of them were changed in training."""


class Engine:
    """A module with its optimizer under DeepSpeed, or a frozen module without one.

    module: the plain model; its parameters may be ZeRO-3 partitioned.
    optimizer: over the module's parameters. None: nothing is trained; all parameters are frozen, and
    only stage 3 has a DeepSpeed engine, which shares the weights among ranks.
    config: the finished DeepSpeed dictionary (`ds_config.deepspeed_config`).
    """

    def __init__(
        self, module: nn.Module, *, optimizer: Optimizer | None, config: dict[str, Any]
    ) -> None:
        self.module = module
        self.base_optimizer = optimizer
        self.zero_stage = int(config.get("zero_optimization", {}).get("stage", 0))
        low_precision = any(config.get(key, {}).get("enabled") for key in ("bf16", "fp16"))
        self.is_fp16 = bool(config.get("fp16", {}).get("enabled"))
        # DeepSpeed clips at stage 0 in fp32 but keeps no norm; there we clip, once, and keep it.
        self._clips_itself = self.zero_stage == 0 and not low_precision
        self._max_norm = float(config.get("gradient_clipping", 0.0))
        if self._clips_itself:
            config = {**config, "gradient_clipping": 0.0}
        self._config = config
        # ZeRO puts its own tensors into the groups; these are the parameters, for a later engine.
        filled = [group["params"] for group in optimizer.param_groups] if optimizer else []
        self._groups: list[list[nn.Parameter]] = [list(group) for group in filled if group]
        self._trained = {p: i for i, group in enumerate(self._groups) for p in group
                         if p.requires_grad}  # fmt: skip
        self._layout: Layout | None = None
        self.engine: Any = None
        """DeepSpeed's engine; the module itself where nothing is trained and nothing is shared."""
        self.device = training_device()
        """Where the module computes: "cpu" or "cuda:0"."""
        self.gradients_are: Literal["absent", "partial", "ready"] = "absent"
        """Whether the gradients of a step are there, or half summed."""
        self.swapped = 0
        """How many contexts stand in for the module's weights now."""
        self.resized: set[str] = set()
        """Weights whose shape was changed in training; checkpoints say so."""
        self._norm: Tensor | float = 0.0
        self._reserved: list[Tensor] | None = None
        self.applied = True
        """Whether the last `step` changed the weights; False after an overflow."""
        if optimizer is None:
            module.requires_grad_(False).eval()
        self.open()

    def open(self) -> None:
        """Make DeepSpeed's engine around module and optimizer. Collective."""
        import deepspeed

        if self.base_optimizer is None and self.zero_stage < 3:
            self.engine = self.module.to(self.device)
            return
        for parameter in self._trained:
            parameter.requires_grad_(True)
        if self.zero_stage == 3:
            traces.forget_with_the_trace()
        divides = divided.before_opening(self._config)
        thrift.compile_muon_when_used()
        with _no_update(self.base_optimizer), _no_memory_reports():
            self.engine, *_ = deepspeed.initialize(
                model=self.module, optimizer=self.base_optimizer,
                config=copy.deepcopy(self._config), dist_init_required=False,
            )  # fmt: skip
        if divides:
            divided.opened(self.engine)
        thrift.save_memory(self.engine.optimizer)
        self.forget_layout()

    @cached_property
    def host(self) -> HostGroup:
        """What ranks agree on over gloo. Made at the first use, which is collective."""
        import torch.distributed as dist

        return HostGroup(
            World(rank=dist.get_rank(), size=dist.get_world_size(), device=self.device)
        )

    @property
    def layout(self) -> Layout:
        """Where DeepSpeed keeps master weights and gradients. Raises RunError on a frozen engine."""
        if self._layout is None:
            self._expect_optimizer()
            groups = [[p for p in group if p in self._trained] for group in self._groups]
            self._layout = layout_of(self.engine, groups)
        return self._layout

    def forget_layout(self) -> None:
        """After shapes changed: find it anew."""
        self._layout = None

    def trained(self, *, frozen_too: bool = False) -> dict[str, nn.Parameter]:
        """Name → parameter that the optimizer updates, in the module's order; without those frozen now,
        unless asked for."""
        return {
            name: parameter
            for name, parameter in self.module.named_parameters()
            if parameter in self._trained and (frozen_too or parameter.requires_grad)
        }

    def group_of(self, parameter: nn.Parameter) -> int | None:
        """The number of the optimizer's group that a parameter is in."""
        return self._trained.get(parameter)

    def regroup(self) -> None:
        """Put the parameters back into the optimizer's groups, without states, for a new engine."""
        if self.base_optimizer is not None:
            for group, parameters in zip(
                self.base_optimizer.param_groups, self._groups, strict=True
            ):
                group["params"] = list(parameters)
            self.base_optimizer.state.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward through the engine (ZeRO-3 gathers as it goes)."""
        return self.engine(*args, **kwargs)

    @property
    def grad_norm(self) -> Tensor | float:
        """L2 norm of the last step's full gradient: unscaled, before clipping. May lie on the device."""
        return self._norm

    def reserve_states(self) -> None:
        """Before the first forward, once: take the memory that optimizer states will need (`reserve`);
        `step` gives it back."""
        if self._reserved is None and self.base_optimizer is not None:
            self._reserved = reserved_states(self.base_optimizer, list(self.layout.flats))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`, already scaled to its share of the step; reduce on the `last`.

        DeepSpeed averages over data-parallel ranks; the caller's scale makes up for that. Any
        number of calls per step is right, and it may differ from step to step.
        """
        self._expect_optimizer()
        if self.swapped:
            raise RunError("a model cannot be trained while other weights stand in for its own")
        first, self.gradients_are = self.gradients_are == "absent", "partial"
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)
        settle(self.engine, first=first, last=last)
        self.gradients_are = "ready" if last else "partial"

    def step(self) -> bool:
        """Clip and update once; return whether the weights changed (see `applied`)."""
        self._expect_optimizer()
        self.gradients_are = "absent"
        self._reserved = []
        scale = self._unfused_scale()
        if self._clips_itself:
            self._norm = self._clip()
        with held(self):
            self.engine.step()
        if not self._clips_itself:
            norm = self.engine.get_global_grad_norm()
            self._norm = 0.0 if norm is None else norm / scale
        self.applied = bool(getattr(self.engine, "_step_applied", True))
        return self.applied

    def _unfused_scale(self) -> float:
        # DeepSpeed's unfused half-precision optimizer reports the norm of the scaled gradient.
        optimizer = self.engine.optimizer
        if type(optimizer).__name__ != "FP16_UnfusedOptimizer":
            return 1.0
        return float(optimizer.loss_scale_config.cur_scale)

    def _clip(self) -> Tensor:
        import torch

        trained = [p for p in self.module.parameters() if p.grad is not None]
        norm = divided.total_norm(trained)
        if self._max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(trained, self._max_norm, norm)
        return norm

    def gradients(self) -> dict[str, Tensor]:
        """Name → gradient of the step under way: whole, float32, on the device, a copy; the mean over
        the global batch, unscaled, before clipping. The same on all ranks. Collective.

        Between the last backward of a step and its `step`; RunError otherwise. Of trained parameters
        that are not frozen now. `each_gradient` holds one at a time.
        """
        return dict(self.each_gradient())

    def each_gradient(self) -> Iterator[tuple[str, Tensor]]:
        """`gradients` one after another; all ranks must iterate to the end, in step."""
        return gradients.each_gradient(self)

    def set_gradients(self, values: Mapping[str, Tensor]) -> None:
        """Replace gradients by name, as `gradients` gives them; the norm of `step` is then theirs.

        The same on all ranks. Raises RunError for an unknown name, another shape, a wrong moment.
        """
        gradients.set_gradients(self, values)

    def resize(self, rows: Mapping[str, surgery.Rows]) -> None:
        """Keep and append rows of parameters together with their optimizer states. Collective.

        Between steps, or when a step's gradients are ready: rows that stay keep theirs, new ones have
        none. Raises RunError for what does not fit, and where ranks bring different values.
        """
        surgery.resize(self, rows)

    def shapes(self) -> dict[str, list[int]]:
        """Name → whole shape of every parameter and of every buffer that checkpoints hold."""
        found = {name: list(divided.whole_shape(p)) for name, p in self.module.named_parameters()}
        for name, buffer in self.module.named_buffers():
            path, _, leaf = name.rpartition(".")
            if leaf not in self.module.get_submodule(path)._non_persistent_buffers_set:
                found[name] = list(buffer.shape)
        return found

    def match_shapes(self, shapes: Mapping[str, Sequence[int]]) -> list[str]:
        """Change first dimensions to `shapes`, for weights that are about to be loaded. Collective."""
        return surgery.match_shapes(self, shapes)

    def full_parameters(
        self, names: Sequence[str] | None = None, *, modify: bool = False
    ) -> contextlib.AbstractContextManager[dict[str, nn.Parameter]]:
        """A context in which the named parameters are whole on every rank; see `access`. Collective."""
        return access.full_parameters(self, names, modify=modify)

    def named_full_parameters(
        self, names: Sequence[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, whole weight in the model's dtype), one at a time, on every rank. Collective."""
        return access.named_full_parameters(self, names)

    def master_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole fp32 master weight, a copy), one at a time, on every rank. Collective."""
        return access.master_weights(self)

    def partitions(self) -> list[Tensor]:
        """This rank's part of the fp32 master weights: live tensors, not to be changed. Local and free.

        Laid out as ZeRO does; the same until shapes or the number of ranks change.
        """
        return [flat.detach() for flat in self.layout.flats]

    def swap_weights(self, values: Mapping[str, Tensor]) -> contextlib.AbstractContextManager[None]:
        """A context in which the module has other weights, by name and whole; see `access`. Collective."""
        return access.swap_weights(self, values)

    def partition_values(self, values: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
        """A context in which the module has the weights of tensors like `partitions()`. Collective."""
        return access.partition_values(self, values)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, gradients flow through the module and do not reach its parameters.

        For the update of another model: call the plain `module`. Afterwards exactly those parameters
        are trainable that were before.
        """
        trainable = [p for p in self.module.parameters() if p.requires_grad]
        try:
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    def save(self, folder: Path, *, tag: str, capture: bool = False) -> list[CapturedFile]:
        """Write DeepSpeed's files of all ranks to `folder/tag`, without what is frozen where the recipe
        brings that back (`frozen_base`). Collective.

        capture: do not write this rank's tensors, but return the files that they would go into.
        """
        with frozen_base.trained_only(self) as smaller, self._captured(capture) as files:
            self.engine.save_checkpoint(
                str(folder), tag=tag, save_latest=False, client_state=self._universal_facts(),
                exclude_frozen_parameters=smaller,
            )  # fmt: skip
        if self.host.world.is_main:
            facts = {"shapes": self.shapes(), "resized": sorted(self.resized)}
            facts |= frozen_base.facts(self) | divided.facts(self.module)
            (folder / tag / SHAPES).write_text(json.dumps(facts))
        return files

    def live_state(self, *, main: bool) -> list[Any]:
        """The tensors that `save` would write of this rank, as they are: for their size. main: of the
        rank that writes the weights."""
        optimizer = self._expect_optimizer()
        rebuilt = frozen_base.is_rebuilt(self.module)
        weights = [p for p in self.module.parameters() if p.requires_grad or not rebuilt]
        return [
            [*weights, *self.module.buffers()] if main or self.zero_stage == 3 else [],
            [group["params"] for group in optimizer.param_groups],
            [[updated, state] for updated, state in optimizer.state.items()],
        ]

    @contextlib.contextmanager
    def _captured(self, capture: bool) -> Iterator[list[CapturedFile]]:
        """A context in which DeepSpeed's files go into the list instead of to the disk; without `capture`
        to the disk, with no more of storages than the tensors in them."""
        writer = self.engine.checkpoint_engine
        captured = Capture(writer)
        if capture:
            self.engine.checkpoint_engine = captured
        elif writer.preserves_storage_sharing():
            self.engine.checkpoint_engine = Apart(writer)
        try:
            yield captured.files
        finally:
            self.engine.checkpoint_engine = writer

    def _universal_facts(self) -> dict[str, Any]:
        # What `ds_to_universal` needs to know of the model; empty: nothing is pipelined or padded. Where
        # layers are divided, AutoTP says which, and it must not be overwritten.
        from deepspeed.checkpoint.constants import (
            UNIVERSAL_CHECKPOINT_INFO,
            UNIVERSAL_CHECKPOINT_VERSION_KEY,
            UNIVERSAL_CHECKPOINT_VERSION_VALUE,
        )

        if hasattr(self.module, UNIVERSAL_CHECKPOINT_INFO):
            return {}
        return {
            UNIVERSAL_CHECKPOINT_INFO: {
                UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE
            }
        }

    def load(self, folder: Path, *, tag: str) -> None:
        """Read what `save` wrote, on a freshly made engine. Collective.

        Weights that had grown or been pruned get their shapes first. Raises CheckpointError where
        DeepSpeed finds nothing to load, or the weights are those of another model.
        """
        optimizer = self._expect_optimizer()
        self._take_shapes(folder / tag / SHAPES)
        stated = [
            {key: group[key] for key in HYPER_PARAMETERS if key in group}
            for group in optimizer.param_groups
        ]
        path, _ = self.engine.load_checkpoint(
            str(folder), tag=tag, load_lr_scheduler_states=False, load_optimizer_states=True,
            load_module_strict=not frozen_base.is_rebuilt(self.module),
        )  # fmt: skip
        if path is None:
            raise CheckpointError(f"DeepSpeed could not load the checkpoint {folder / tag}")
        # What the recipe says of each group holds. DeepSpeed (0.19.8) gives all groups those of the
        # first when it loads a universal checkpoint at stage 3, so that norms would decay.
        for group, values in zip(optimizer.param_groups, stated, strict=True):
            group.update(values)
        self._unshare_steps(optimizer)
        self.gradients_are = "absent"

    def _take_shapes(self, path: Path) -> None:
        if not path.exists():  # written before shapes were
            return
        facts = json.loads(path.read_text())
        frozen_base.check(self, facts, path.parent)
        own, shapes = self.shapes(), facts["shapes"]
        for name in sorted(own.keys() & shapes.keys()):
            if own[name] != shapes[name] and name not in facts["resized"]:
                raise CheckpointError(
                    f"{path.parent} holds {name} in the shape {tuple(shapes[name])}, this model has "
                    f"{tuple(own[name])}\n    resume with the model that was trained"
                )
        try:
            self.match_shapes(shapes)
        except RunError as error:
            raise CheckpointError(f"{path.parent} does not fit this model: {error}") from error
        self.resized |= set(facts["resized"])

    def _unshare_steps(self, optimizer: Optimizer) -> None:
        # The same load hands one `step` tensor to every partition; each update would then count
        # once per partition and spoil Adam's bias correction.
        import torch

        for state in optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    def destroy(self) -> None:
        """Free buffers and hooks; the engine is not usable afterwards."""
        self.close()

    def close(self) -> None:
        """Take DeepSpeed off the module: hooks, buffers, what ZeRO-3 left in submodules."""
        self.forget_layout()
        engine, self.engine = self.engine, None
        if engine is None or engine is self.module:
            return
        access.release(engine, self.zero_stage)
        divided.closed(engine)
        engine.destroy()
        if self.zero_stage == 3:
            traces.forget()
        for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
            hook.remove()
        _forget_zero(self.module)
        # Hooks and engine refer to each other, so that the collector finds them some time later. Their
        # tensors go now; and what is collected then must not destroy what the next engine made.
        if engine.optimizer is not self.base_optimizer:
            vars(engine.optimizer).clear()
        engine.optimizer = engine.basic_optimizer = engine.client_optimizer = None

    def _expect_optimizer(self) -> Optimizer:
        if self.base_optimizer is None:
            raise RunError(
                "this model is frozen: it has no optimizer, and is neither trained nor saved"
            )
        return self.base_optimizer


@contextlib.contextmanager
def _no_update(optimizer: Optimizer | None) -> Iterator[None]:
    """DeepSpeed (0.19.8) makes the states at stage 0 in low precision by a step on zero gradients, which
    decays the weights at full learning rate and counts in Adam's bias correction. Without it, states
    come with the first true step, as at every other stage."""
    if optimizer is None:
        yield
        return
    own = vars(optimizer).get("step")  # a scheduler wraps it
    vars(optimizer)["step"] = lambda *_, **__: None
    try:
        yield
    finally:
        del vars(optimizer)["step"]
        if own is not None:
            vars(optimizer)["step"] = own


@contextlib.contextmanager
def _no_memory_reports() -> Iterator[None]:
    """DeepSpeed's optimizer for stage 1 in bf16 prints its memory seven times, asked or not, and collects
    garbage each time: a second and a half for every engine."""
    from deepspeed.runtime import bf16_optimizer

    report = bf16_optimizer.see_memory_usage
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    try:
        yield
    finally:
        bf16_optimizer.see_memory_usage = report


def _forget_zero(module: nn.Module) -> None:
    """Undo what ZeRO stores in parameters and submodules and never takes back: it would hold the old
    engine's memory, and at stage 3 a new engine would use the old's hooks."""
    from deepspeed.runtime.zero import parameter_offload

    for parameter in module.parameters():
        for name in ("_z3_optimizer", "_zero_optimizer", "_hp_mapping", "_hp_grad", "grad_accum"):
            vars(parameter).pop(name, None)
    for child in module.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn", "ds_grads_remaining",
                     "applied_pre_backward_ref_cnt", "ds_inflight_param_registry"):  # fmt: skip
            vars(child).pop(name, None)
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [entry for entry in stack if entry is not module]


def to_universal(source: Path, target: Path, *, for_parts: bool = False) -> None:
    """Convert DeepSpeed's sharded files in `source` to its universal form in `target` (one process).

    The universal form loads at any number of ranks. Raises CheckpointError with DeepSpeed's reason.
    for_parts: an engine will load it whose layers are divided. At stage 3 DeepSpeed (0.19.8) takes a rank's
    part only of what lies in a map, and writes tensors by themselves.
    """
    import io
    from types import SimpleNamespace

    from deepspeed.checkpoint import ds_to_universal

    arguments = SimpleNamespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    chatter = io.StringIO()
    try:
        with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter):
            ds_to_universal.main(arguments)
        if for_parts:
            _into_maps(target / "zero")
        if (source / SHAPES).exists():
            (target / SHAPES).write_text((source / SHAPES).read_text())
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {source} could not be converted to another number of ranks: {error}"
        ) from error


def _into_maps(folder: Path) -> None:
    import torch
    from deepspeed.checkpoint.constants import PARAM

    for path in folder.glob("*/*.pt"):
        if torch.is_tensor(content := torch.load(path, weights_only=True)) and content.ndim:
            torch.save({PARAM: content}, path)
