"""Exporters: the trained model in the forms of other programs, written once after training.

    exporters: [{type: safetensors}, {type: onnx}, {type: torchscript}]

Each appears whole or not at all as `exports/<file>` in the run directory. `huggingface` folders of
language models are a checkpoint engine, since they are wanted during training as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from arctic_like.checkpoint.publish import aside, sync
from arctic_like.config.base import PartConfig
from arctic_like.config.values import HumanInt
from arctic_like.errors import RecipeError, RunError
from arctic_like.registry import Part

if TYPE_CHECKING:
    from torch import nn


class ExporterConfig(PartConfig):
    """One entry of the recipe's `exporters:`."""

    file: str = ""
    """Name of the file in `exports/`; the model's name with the format's suffix unless given."""

    learner: str = "model"
    """Which learner's model."""


class Exporter(Part, family="exporter"):
    """Writes a whole model. A subclass says how, in `write`."""

    config_type = ExporterConfig
    config: Any
    suffix: ClassVar[str] = ""
    needs_example: ClassVar[bool] = False
    """Whether it runs the model once, on an example of its inputs."""

    def problems(self) -> str:
        """Why it cannot work here, known before training; empty where it can."""
        return ""

    def write(self, module: nn.Module, path: Path, example: tuple[Any, ...]) -> None:
        """Write `path`. module: whole, on the CPU, float32, in eval mode. example: its inputs, one row."""
        raise NotImplementedError

    def export(self, module: nn.Module, folder: Path, example: tuple[Any, ...]) -> Path:
        """Write into `folder` so that the file appears whole; returns it. Raises RunError naming the
        exporter where the model cannot be written in its form."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (self.config.file or f"{self.config.learner}{self.suffix}")
        partial = aside(path)
        try:
            self.write(module, partial, example)
        except Exception as error:
            partial.unlink(missing_ok=True)
            raise RunError(
                f"the exporter {self.name!r} cannot write {type(module).__name__}: "
                f"{type(error).__name__}: {error}\n    the training itself is complete; its "
                "checkpoints are not touched"
            ) from error
        partial.chmod(0o666 & ~_umask())  # some writers make files for their owner alone
        sync(partial)
        partial.rename(path)
        sync(folder)
        return path


class SafetensorsExporter(Exporter):
    """The weights by name, as one safetensors file; shared ones once."""

    name = "safetensors"
    suffix = ".safetensors"

    def write(self, module: nn.Module, path: Path, example: tuple[Any, ...]) -> None:
        from safetensors.torch import save_model

        save_model(module, str(path), metadata={"format": "pt"})


class TorchScriptExporter(Exporter):
    """A traced TorchScript program: it runs without the model's code, in C++ too."""

    name = "torchscript"
    suffix = ".pt"
    needs_example = True

    def write(self, module: nn.Module, path: Path, example: tuple[Any, ...]) -> None:
        import torch

        with torch.no_grad():
            traced = torch.jit.trace(module, example)  # type: ignore[no-untyped-call]
        traced.save(str(path))


class ONNXConfig(ExporterConfig):
    """`type: onnx`."""

    type: str = "onnx"

    opset: HumanInt | None = Field(default=None, ge=18)
    """ONNX operator set; the newest that torch writes by default unless given."""


class ONNXExporter(Exporter):
    """An ONNX graph with a free number of rows; needs the extra `onnx`."""

    name = "onnx"
    config_type = ONNXConfig
    suffix = ".onnx"
    needs_example = True

    def problems(self) -> str:
        import importlib.util

        missing = [
            name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None
        ]
        if not missing:
            return ""
        return f"needs {' and '.join(missing)}: pip install 'arctic-like[onnx]'"

    def write(self, module: nn.Module, path: Path, example: tuple[Any, ...]) -> None:
        import contextlib
        import io
        import logging

        import torch

        rows = torch.export.Dim("rows")
        shapes = tuple(
            {0: rows} if hasattr(value, "ndim") and value.ndim else None for value in example
        )
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # names what torchvision would add
        with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress
            program = torch.onnx.export(
                module, example, dynamo=True, opset_version=self.config.opset,
                dynamic_shapes=shapes, verbose=False,
            )  # fmt: skip
        assert program is not None
        program.save(str(path))


def check_exporters(exporters: list[Exporter], learners: list[str]) -> None:
    """Raise RecipeError for exporters that could not work, before hours of training."""
    from arctic_like.errors import Problem

    found = []
    for number, exporter in enumerate(exporters):
        if reason := exporter.problems():
            found.append(Problem(reason, f"exporters.{number}"))
        if exporter.config.learner not in learners:
            have = ", ".join(learners)
            found.append(
                Problem(f"is {exporter.config.learner!r}; this run has {have}",
                        f"exporters.{number}.learner")
            )  # fmt: skip
    if found:
        raise RecipeError(found)


@contextmanager
def whole_copy(module: nn.Module) -> Iterator[nn.Module | None]:
    """A copy of a model on the CPU in float32 and eval mode, on rank 0; None elsewhere. Collective.

    Parameters that ZeRO-3 divides are gathered one by one into the copy.
    """
    import torch

    from arctic_like.engine.weights import iterate_weights
    from arctic_like.model.projections import drop_projections

    copy = _skeleton(module) if _is_main() else None
    places: dict[str, Any] = {}
    if copy is not None:
        drop_projections(copy)
        places = {
            **dict(copy.named_parameters(remove_duplicate=False)),
            **dict(copy.named_buffers()),
        }
    for name, tensor in iterate_weights(module):
        if tensor is not None and name in places:
            with torch.no_grad():
                places[name].data = tensor.float() if tensor.is_floating_point() else tensor
    with _plain_linear():
        yield copy.eval() if copy is not None else None


@contextmanager
def _plain_linear() -> Iterator[None]:
    """Torch's own `linear`: at ZeRO-3 DeepSpeed puts one in its place, for the whole process, that no tracer
    can write down."""
    import torch.nn.functional as F
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

    plain = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", None)
    found = F.linear
    F.linear = plain or found
    try:
        yield
    finally:
        F.linear = found


def _skeleton(module: nn.Module) -> nn.Module:
    """A copy without the engine's hooks, and without the memory of divided parameters."""
    import copy

    import torch

    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = torch.nn.Parameter(
            torch.empty(0) if hasattr(parameter, "ds_id") else parameter.detach().cpu().clone(),
            requires_grad=False,
        )
    for one in module.modules():
        for name in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        ):
            hooks = getattr(one, name, None)
            if hooks:
                memo[id(hooks)] = type(hooks)()
    return copy.deepcopy(module, memo)


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def _is_main() -> bool:
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0
