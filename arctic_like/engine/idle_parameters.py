"""Gradients of parameters that a micro-batch did not reach: an expert without tokens, a branch not taken.

DeepSpeed (0.19.8) writes a gradient when autograd brings one. Where it keeps the places from step to step
(stage 3, and every offloaded optimizer), a parameter that was not reached is updated with its gradient of
an earlier step; and an offloaded one that only earlier micro-batches of a step reached loses theirs. At
stage 1 in bf16 each rank leaves what its own micro-batches did not reach out of the norm, and unclipped.
`settle` mends all three after each backward. It looks at names only: nothing waits for the device.
"""

from __future__ import annotations

from typing import Any


def settle(engine: Any, *, first: bool, last: bool) -> None:
    """Put right what a backward left of parameters that it did not reach.

    engine: DeepSpeed's; first, last: whether this was the first, the last micro-batch of the step.
    """
    kind = type(engine.optimizer).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        _settle_stage_3(engine.optimizer, first=first, last=last)
    elif kind == "DeepSpeedZeroOptimizer" and engine.optimizer.cpu_offload:
        _settle_offload(engine.optimizer, first=first, last=last)
    elif kind == "BF16_Optimizer" and last:
        for has_gradients in engine.optimizer.fp32_groups_has_gradients:
            has_gradients[:] = [True] * len(has_gradients)


def _settle_stage_3(optimizer: Any, *, first: bool, last: bool) -> None:
    reached = optimizer._offload_boundary_param_ids  # by this step's micro-batches so far
    places = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    parameters = [p for group in optimizer.fp16_groups for p in group]
    if first:
        for parameter in parameters:
            if parameter.ds_id not in reached:
                places[parameter.ds_id].zero_()
    if not last or not optimizer.offload_optimizer:
        return
    swapped: dict[int, Any] = {}
    offsets: dict[int, Any] = {}
    for parameter in parameters:  # what the last micro-batch did not hand to the optimizer
        if optimizer.get_param_id(parameter) not in optimizer.norm_for_param_grads:
            place = places[parameter.ds_id]
            optimizer._offload_grad_partition_at_boundary(parameter, place, swapped, offsets)
    optimizer._swap_out_offload_fp32_gradients(swapped, offsets)


def _settle_offload(optimizer: Any, *, first: bool, last: bool) -> None:
    reached = optimizer._offload_accumulated_param_ids
    if first:
        for number, place in optimizer.accumulated_grads_in_cpu.items():
            if number not in reached:
                place.zero_()
    if not last:
        return
    for group, parameters in enumerate(optimizer.params_in_partition):
        for parameter in parameters:
            number = optimizer.get_param_id(parameter)
            if number in optimizer.norm_for_param_grads:
                continue
            if number not in reached:
                _, _, offset, count = optimizer.grad_position[number]
                flat = optimizer.single_partition_of_fp32_groups[group]
                flat.grad.view(-1).narrow(0, offset, count).zero_()
            elif optimizer._use_compact_grad_partition_buffer(group):
                optimizer.copy_grads_in_partition(parameter, group)
            else:
                optimizer._restore_cpu_offload_grad_to_gpu(parameter)
                optimizer.set_norm_for_param_grad_in_gpu(parameter)
                optimizer.update_offload_overflow_tracker_for_param_grad(parameter)
                optimizer.async_inplace_copy_grad_to_fp32_buffer_from_gpu(parameter)
