"""One DeepSpeed engine behind six verbs: begin · backward · step · save · load · destroy.

Knows DeepSpeed's habits so that the loop need not: who divides by what, where the gradient norm
is to be found at each ZeRO stage, and when an update was skipped. Knows no data and no recipe.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

HYPER_PARAMETERS = ("lr", "initial_lr", "betas", "eps", "weight_decay", "momentum")


class Engine:
    """A module with its optimizer under DeepSpeed.

    module: the plain model; its parameters may be ZeRO-3 partitioned.
    config: the finished DeepSpeed dictionary (`ds_config.deepspeed_config`).
    """

    def __init__(self, module: nn.Module, *, optimizer: Optimizer, config: dict[str, Any]) -> None:
        import deepspeed

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
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
        self._norm: Tensor | float = 0.0
        self.applied = True
        """Whether the last `step` changed the weights; False after an overflow."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward through the engine (ZeRO-3 gathers as it goes)."""
        return self.engine(*args, **kwargs)

    @property
    def grad_norm(self) -> Tensor | float:
        """L2 norm of the last step's full gradient: unscaled, before clipping. May lie on the device."""
        return self._norm

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`, already scaled to its share of the step; reduce on the `last`.

        DeepSpeed averages over data-parallel ranks; the caller's scale makes up for that. Any
        number of calls per step is right, and it may differ from step to step.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> bool:
        """Clip and update once; return whether the weights changed (see `applied`)."""
        scale = self._unfused_scale()
        if self._clips_itself:
            self._norm = self._clip()
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
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if self._max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(trained, self._max_norm, norm)
        return norm

    def save(self, folder: Path, *, tag: str) -> None:
        """Write DeepSpeed's files of all ranks to `folder/tag`. Collective."""
        self.engine.save_checkpoint(
            str(folder), tag=tag, save_latest=False, client_state=self._universal_facts()
        )

    def _universal_facts(self) -> dict[str, Any]:
        # What `ds_to_universal` needs to know of the model; empty: nothing is pipelined or padded.
        from deepspeed.checkpoint.constants import (
            UNIVERSAL_CHECKPOINT_INFO,
            UNIVERSAL_CHECKPOINT_VERSION_KEY,
            UNIVERSAL_CHECKPOINT_VERSION_VALUE,
        )

        return {
            UNIVERSAL_CHECKPOINT_INFO: {
                UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE
            }
        }

    def load(self, folder: Path, *, tag: str) -> None:
        """Read what `save` wrote, on a freshly made engine. Collective.

        Raises CheckpointError where DeepSpeed finds nothing to load.
        """
        stated = [
            {key: group[key] for key in HYPER_PARAMETERS if key in group}
            for group in self.base_optimizer.param_groups
        ]
        path, _ = self.engine.load_checkpoint(
            str(folder), tag=tag, load_lr_scheduler_states=False, load_optimizer_states=True
        )
        if path is None:
            raise CheckpointError(f"DeepSpeed could not load the checkpoint {folder / tag}")
        # What the recipe says of each group holds. DeepSpeed (0.19.8) gives all groups those of the
        # first when it loads a universal checkpoint at stage 3, so that norms would decay.
        for group, values in zip(self.base_optimizer.param_groups, stated, strict=True):
            group.update(values)
        self._unshare_steps()

    def _unshare_steps(self) -> None:
        # The same load hands one `step` tensor to every partition; each update would then count
        # once per partition and spoil Adam's bias correction.
        import torch

        for state in self.base_optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    def destroy(self) -> None:
        """Free buffers and hooks; the engine is not usable afterwards."""
        self.engine.destroy()


def to_universal(source: Path, target: Path) -> None:
    """Convert DeepSpeed's sharded files in `source` to its universal form in `target` (one process).

    The universal form loads at any number of ranks. Raises CheckpointError with DeepSpeed's reason.
    """
    import contextlib
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
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {source} could not be converted to another number of ranks: {error}"
        ) from error
