"""`distill`: a student learns from a frozen teacher's distribution over the next token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from arctic_like.config.base import Config
from arctic_like.config.values import HumanFloat, HumanInt
from arctic_like.errors import Problem, RecipeError
from arctic_like.loss import Loss
from arctic_like.methods.distillation import Kind, logged_as
from arctic_like.trainer.causal import PLACES, CausalTrainer
from arctic_like.trainer.config import LearnerConfig, TrainerConfig
from arctic_like.trainer.dpo import _free
from arctic_like.trainer.preference_config import raise_problems

if TYPE_CHECKING:
    from torch import Tensor

    from arctic_like.data.base import PreparedData
    from arctic_like.kernels.tiles import Head
    from arctic_like.model.heads import LinearHead
    from arctic_like.trainer.teacher_table import TeacherTable

TEACHER = "teacher"
KEPT = ("teacher_tokens", "teacher_logprobs")
"""In a batch: what the teacher's table says of its trained places."""


class TeacherCacheConfig(Config):
    """What is kept of a teacher that is asked once."""

    top_k: HumanInt = Field(default=64, ge=1)
    """Tokens whose probabilities are kept at every trained place; all others count as one."""


class DistillConfig(TrainerConfig):
    """A recipe of `type: distill`."""

    type: str = "distill"
    """The trainer: a student (`model`) learns from a `teacher`."""

    teacher: LearnerConfig = Field(default_factory=lambda: LearnerConfig(frozen=True))
    """The teacher; frozen. Its `deepspeed` may divide it (stage 3) where the student is whole, its
    `model.dtype` may be another."""

    temperature: Annotated[HumanFloat, Field(gt=0)] = 1.0
    """Both distributions are softened by it."""

    distill_weight: Annotated[HumanFloat, Field(ge=0, le=1)] = 0.5
    """Share of the teacher's loss; the rest is the labels' cross-entropy."""

    divergence: Kind = "forward"
    """KL(teacher ‖ student) is `forward`: the student covers what the teacher does. KL(student ‖ teacher) is
    `reverse`: it keeps to what the teacher prefers. `jsd` lies between, by `beta`."""

    beta: Annotated[HumanFloat, Field(gt=0, lt=1)] = 0.5
    """The teacher's share in the mixture of `jsd`."""

    hidden_layers: dict[HumanInt, HumanInt] = Field(default_factory=dict)
    """Layer of the student → layer of the teacher whose hidden states it learns: `{1: 2, 2: 4}`. They count
    from 1; 0 are the embeddings. Both must have one width, or there is a `hidden_projection`."""

    hidden_projection: HumanInt | None = Field(default=None, ge=1)
    """Width of the teacher's hidden states: the student's are mapped to it, each of `hidden_layers` by a
    matrix of its own, which is trained with it, saved and resumed, and in no export."""

    hidden_weight: Annotated[HumanFloat, Field(ge=0)] = 1.0
    """Weight of the mean squared difference of hidden states, the mean over `hidden_layers`."""

    teacher_cache: TeacherCacheConfig | None = None
    """Ask the teacher once, before training, and keep its highest probabilities in the data's cache: no
    second model in memory while training."""

    @property
    def built_apart(self) -> tuple[str, ...]:
        """Learners that are described and not built with the run: a teacher that is asked once."""
        return (TEACHER,) if self.teacher_cache is not None else ()

    @model_validator(mode="after")
    def _projections_of_the_student(self) -> Self:
        """The student has the matrices: not stated, so a recipe that is written out does not say them."""
        if self.hidden_projection is None:
            return self
        problem = None
        if not self.hidden_layers:
            problem = Problem("is given, but no states are compared", "hidden_projection",
                              "set hidden_layers, or leave it out")  # fmt: skip
        elif getattr(self.model, "adapted", False):
            problem = Problem("is given, but is not built for a student with an adapter",
                              "hidden_projection", "train all weights, or leave it out")  # fmt: skip
        if problem is not None:
            raise_problems(type(self).__name__, [problem])
        key = "hidden_projections"
        widths = dict.fromkeys(self.hidden_layers, self.hidden_projection)
        made = self.model.model_copy(update={key: widths})
        made.model_fields_set.discard(key)
        self.__dict__["model"] = made
        return self

    @model_validator(mode="after")
    def _kept_or_hidden(self) -> Self:
        if self.teacher_cache is not None and self.hidden_layers:
            problem = Problem(
                "is given, but hidden states are not kept", "hidden_layers",
                "leave it out, or teacher_cache",
            )  # fmt: skip
            raise_problems(type(self).__name__, [problem])
        if self.teacher_cache is not None and getattr(self.data, "streaming", False):
            problem = Problem(
                "is given, but the samples of a stream are made while training", "teacher_cache",
                "leave it out, or data.streaming",
            )  # fmt: skip
            raise_problems(type(self).__name__, [problem])
        return self


class DistillTrainer(CausalTrainer):
    """(1 - w) · cross-entropy + w · T² · divergence, over trained tokens; by default KL(teacher ‖ student).

    Hinton, Vinyals and Dean 2015, section 2: softened by T, and T² because gradients scale with 1 / T².
    """

    name = "distill"
    divides_models: ClassVar[bool] = False
    config_type: ClassVar[type[TrainerConfig]] = DistillConfig
    data_factory_type: ClassVar[Any] = ("sft", "causal")
    _table: TeacherTable | None = None
    _kept_vocabulary: int | None = None
    """Tokens of the teacher that was asked and freed."""

    def on_data_prepared(self, data: PreparedData, build: Any) -> None:
        """A teacher that is asked once: built, asked and freed before there is a student. Collective."""
        if self.config.teacher_cache is None:
            return
        self._refuse_trained()
        from arctic_like.registry import build as build_part
        from arctic_like.trainer.teacher_table import tabulate

        learner = build(TEACHER, self.config.teacher)
        engine = learner.engine
        part: Any = build_part(self.config.model, "model")
        own, self._kept_vocabulary = part.facts().vocab_size, _vocabulary(engine.module)
        if own:  # else the tokenizer's, which the student will say
            _check(own, self._kept_vocabulary)

        def logits(batch: dict[str, Any]) -> Tensor:
            moved = CausalTrainer.to_device(self, batch)
            inputs = self.inputs_of(engine.module, moved)
            found: Tensor = engine(**inputs).logits
            return found.view(*moved["input_ids"].shape, -1)

        self._table = tabulate(
            self.config, data, logits, module=engine.module, host=self.session.host
        )
        engine.destroy()
        _free()

    def configure(self) -> None:
        """Raises RecipeError where the teacher is trained, or has another vocabulary or width."""
        self._refuse_trained()
        if self._kept_vocabulary is not None:
            _check(_vocabulary(self.module), self._kept_vocabulary)
            return
        teacher: Any = self.learner(TEACHER).engine.module
        student: Any = self.module
        _check(_vocabulary(student), _vocabulary(teacher))
        for own, theirs in self.config.hidden_layers.items():
            for place, number, module in (("key", own, student), ("value", theirs, teacher)):
                layers = int(module.config.get_text_config().num_hidden_layers)
                if not 0 <= number <= layers:
                    what = "student" if place == "key" else "teacher"
                    raise RecipeError(
                        Problem(f"names layer {number}; the {what} has {layers}", "hidden_layers")
                    )
        widths = [int(m.config.get_text_config().hidden_size) for m in (student, teacher)]
        own = self.config.hidden_projection or widths[0]
        if self.config.hidden_layers and own != widths[1]:
            place = "hidden_projection" if self.config.hidden_projection else "hidden_layers"
            raise RecipeError(
                Problem(
                    f"compares states of {own} values with states of {widths[1]}",
                    place,
                    f"set hidden_projection: {widths[1]}, a trained map of the student's states",
                )
            )

    def _refuse_trained(self) -> None:
        if not self.config.teacher.frozen:
            raise RecipeError(
                Problem(
                    "is false, but a teacher is not trained", "teacher.frozen", "set it to true"
                )
            )

    def to_device(self, batch: Any) -> Any:
        """The batch on the device, with what is kept of the teacher."""
        moved = super().to_device(batch)
        if self._table is None or not isinstance(batch, Mapping) or "labels" not in batch:
            return moved
        found = self._table.of(batch)
        return {**moved, **{k: v.to(self.device) for k, v in zip(KEPT, found, strict=True)}}

    def loss(self, batch: dict[str, Tensor]) -> Loss:
        """The mean over trained tokens; `cross_entropy`, `kl` (or `reverse_kl`, `jsd`) and `hidden` are
        logged."""
        if self._table is not None:
            return self._kept_loss(batch)
        wanted = bool(getattr(self.config, "hidden_layers", None))
        with _states(self, wanted) as seen:
            if self._head is not None and self._teacher_head is not None:
                found = self._tiled_loss(batch, self._head, self._teacher_head)
            else:
                found = self._plain_loss(batch)
            return self._with_states(found, batch, seen) if wanted else found

    def _plain_loss(self, batch: dict[str, Tensor]) -> Loss:
        """From the full logits of both."""
        import torch

        from arctic_like.methods.distillation import divergence

        trained = _trained(batch)
        student = self.logits(batch)[:, :-1][trained].float()
        with torch.no_grad():
            teacher = self.teacher_logits(batch)[:, :-1][trained].float()
        heat = self.config.temperature
        apart = divergence(
            (student / heat).log_softmax(-1), (teacher / heat).log_softmax(-1),
            kind=self._kind, beta=self._beta,
        )  # fmt: skip
        return self._mixed(student, apart, batch)

    def _kept_loss(self, batch: dict[str, Tensor]) -> Loss:
        """From the student's full logits and what is kept of the teacher."""
        from arctic_like.methods.distillation import coarse, divergence

        student = self.logits(batch)[:, :-1][_trained(batch)].float()
        tokens, teacher = (batch[name] for name in KEPT)
        own = coarse(student, tokens.long(), temperature=self.config.temperature)
        apart = divergence(own, teacher, kind=self._kind, beta=self._beta)
        return self._mixed(student, apart, batch)

    def _mixed(self, student: Tensor, apart: Tensor, batch: dict[str, Tensor]) -> Loss:
        """student: (tokens, vocabulary) logits of trained places. apart: (tokens,) of the divergence."""
        import torch.nn.functional as F

        targets = batch["labels"][:, 1:][_trained(batch)]
        count = max(len(targets), 1)
        cross_entropy = F.cross_entropy(student, targets, reduction="sum") / count
        divergence = apart.sum() / count
        share, heat = self.config.distill_weight, self.config.temperature
        return Loss(
            (1 - share) * cross_entropy + share * heat**2 * divergence,
            values={
                "cross_entropy": cross_entropy.detach(),
                logged_as(self._kind): divergence.detach(),
            },
        )

    def _tiled_loss(
        self, batch: dict[str, Tensor], head: LinearHead, teacher_head: LinearHead
    ) -> Loss:
        """The same without the full logits of either."""
        import torch

        from arctic_like.kernels.linear_loss import IGNORE, linear_distillation, next_tokens
        from arctic_like.model.heads import gathered, through_head

        engine = self.learner(TEACHER).engine
        inputs = self.inputs_of(engine.module, batch)
        with torch.no_grad():
            (softened,) = through_head(teacher_head, lambda: engine(**inputs), lambda h, _: (h,))
        targets, config = next_tokens(batch["labels"]), self.config
        with gathered(teacher_head) as teacher:

            def compute(hidden: Tensor, own: Head) -> tuple[Tensor, ...]:
                found = linear_distillation(
                    hidden, own, softened, teacher, targets, share=config.distill_weight,
                    temperature=config.temperature, places=batch.get(PLACES),
                    kind=self._kind, beta=self._beta,
                )  # fmt: skip
                return found.total, found.cross_entropy, found.divergence

            inputs = self.model_inputs(batch)
            total, labels, apart = through_head(head, lambda: self.model(**inputs), compute)
        count = (targets != IGNORE).sum().clamp(min=1)
        values = {"cross_entropy": labels / count, logged_as(self._kind): apart / count}
        return Loss(total / count, values=values)

    def _with_states(
        self, found: Loss, batch: dict[str, Tensor], seen: dict[str, list[Tensor]]
    ) -> Loss:
        """The loss with the distance of hidden states at the places that predict a trained token."""
        import torch

        from arctic_like.methods.distillation import state_distance

        trained = _trained(batch)
        shape = batch["labels"].shape

        def states(name: str, layer: int) -> Tensor:
            return seen[name][layer].view(*shape, -1)[:, :-1][trained]

        layers: dict[int, int] = self.config.hidden_layers
        apart = [
            state_distance(states("student", own), states("teacher", theirs)).sum()
            for own, theirs in layers.items()
        ]
        mean = torch.stack(apart).mean() / trained.sum().clamp(min=1)
        values = {**found.values, "hidden": mean.detach()}
        return Loss(found.mean + self.config.hidden_weight * mean, values=values)

    @property
    def _kind(self) -> Kind:
        kind: Kind = getattr(self.config, "divergence", "forward")
        return kind

    @property
    def _beta(self) -> float:
        return float(getattr(self.config, "beta", 0.5))

    @cached_property
    def _teacher_head(self) -> LinearHead | None:
        """As `_head`; None where a subclass has teacher's logits of its own."""
        from arctic_like.model.heads import find_head

        if type(self).teacher_logits is not DistillTrainer.teacher_logits:
            return None
        return find_head(self.learner(TEACHER).engine.module, device=self.device).head

    def teacher_logits(self, batch: dict[str, Tensor]) -> Tensor:
        """The teacher's logits, (batch, length, vocabulary), packed documents apart."""
        engine = self.learner(TEACHER).engine
        inputs = self.inputs_of(engine.module, batch)
        logits: Tensor = engine(**inputs).logits
        return logits.view(*batch["input_ids"].shape, -1)


@contextmanager
def _states(trainer: DistillTrainer, wanted: bool) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, the hidden states of the next forward of both models are kept, by "student" and "teacher"."""
    seen: dict[str, list[Tensor]] = {}
    if not wanted:
        yield seen
        return

    def ask(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "output_hidden_states": True}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            seen[name] = list(output.hidden_states)
            for layer, projected in getattr(output, "projected", {}).items():
                seen[name][layer] = projected

        return hook

    handles = []
    modules = {"student": trainer.module, "teacher": trainer.learner(TEACHER).engine.module}
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(ask, with_kwargs=True))
        handles.append(module.register_forward_hook(keep(name)))
    try:
        # the search for heads runs the models, and is not what is asked for
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _trained(batch: Mapping[str, Tensor]) -> Tensor:
    """(rows, length - 1) bool: the places that predict a trained token."""
    from arctic_like.trainer.losses import IGNORE

    return batch["labels"][:, 1:] != IGNORE


def _check(own: int, theirs: int) -> None:
    if own != theirs:
        raise RecipeError(
            Problem(
                f"has {theirs:,} tokens, the student {own:,}: their distributions cannot be compared",
                "teacher.model",
                "take a teacher of the same family, or a student with its vocabulary",
            )
        )


def _vocabulary(module: Any) -> int:
    return int(module.config.vocab_size)
