"""Full gradients of the step under way, read and replaced at every ZeRO stage.

Between the last backward and the optimizer step only: before, ZeRO has not reduced them, and afterwards
they are gone. What is given is what the optimizer uses: the mean over the global batch, without the
factor by which fp16 scales losses, before clipping.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from arctic_like.engine.divided import joined, part_of, whole_shape
from arctic_like.engine.layout import assemble, loss_scale, shape_of
from arctic_like.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from arctic_like.engine.deepspeed import Engine


def each_gradient(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """(name, full float32 gradient on the device), one parameter after another, as copies.

    Every parameter that the optimizer trains and that is not frozen now, in the module's order; zeros
    where the loss did not depend on it. All ranks get the same and must iterate to the end, in step.
    """
    _expect_gradients(engine, "read")
    layout, scale = engine.layout, loss_scale(engine.engine)
    group = engine.engine.seq_data_parallel_group
    for name, parameter in engine.trained().items():
        start, _ = layout.range_of(parameter)
        gradient = assemble(
            layout.gradient(parameter), start=start, shape=shape_of(parameter), group=group,
            sharded=layout.sharded_gradients,
        )  # fmt: skip
        yield name, joined(parameter, gradient.div_(scale))


def set_gradients(engine: Engine, values: Mapping[str, Tensor]) -> None:
    """Replace gradients by name: whole tensors of any floating dtype, unscaled; the others stay.

    Must be the same on all ranks. At stage 0 in low precision they are rounded to the model's dtype,
    in which DeepSpeed keeps them there. Raises RunError for an unknown name or another shape.
    """
    import torch

    _expect_gradients(engine, "set")
    scale = loss_scale(engine.engine)
    for name, parameter in checked(engine, values, what="gradient").items():
        whole = values[name].detach().to(engine.device, torch.float32)
        own = part_of(parameter, whole).reshape(-1)
        engine.layout.set_gradient(parameter, own * scale if scale != 1.0 else own)


def checked(engine: Engine, values: Mapping[str, Tensor], *, what: str) -> dict[str, nn.Parameter]:
    """The trained parameters that `values` names. Raises RunError for a name or a shape that is wrong."""
    trained = engine.trained()
    for name, value in values.items():
        if name not in trained:
            close = difflib.get_close_matches(name, trained, n=1, cutoff=0.3)
            hint = f"did you mean {close[0]}?" if close else "see Engine.trained()"
            raise RunError(f"there is no trained parameter {name!r} to give a {what}\n    {hint}")
        if tuple(value.shape) != whole_shape(trained[name]):
            raise RunError(
                f"the {what} of {name} has the shape {tuple(value.shape)}, "
                f"but the parameter has {whole_shape(trained[name])}\n    give one value per element"
            )
    return {name: trained[name] for name in values}


def carried(engine: Engine) -> dict[str, Tensor]:
    """Gradients as copies on the host, for a new engine to go on with. Collective."""
    return {name: gradient.cpu() for name, gradient in each_gradient(engine)}


def handed_over(engine: Engine, values: Mapping[str, Tensor]) -> None:
    """Give a new engine gradients before it had a backward, so that its next call is `step`."""
    engine.engine.set_gradient_accumulation_boundary(True)
    engine.layout.open_gradients()
    set_gradients(engine, values)


def _expect_gradients(engine: Engine, verb: str) -> None:
    if engine.gradients_are != "ready":
        when = "half summed" if engine.gradients_are == "partial" else "not there"
        raise RunError(
            f"gradients cannot be {verb} now: they are {when}\n"
            "    do it between the last backward of a step and its optimizer step "
            "(on_gradients_ready)"
        )
