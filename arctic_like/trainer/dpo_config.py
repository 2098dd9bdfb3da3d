"""What a recipe of `type: dpo` says: losses that go together, and which model is the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from arctic_like.config.base import PartConfig
from arctic_like.config.values import HumanFloat, HumanInt
from arctic_like.errors import Problem
from arctic_like.methods.divergence import DIVERGENCES
from arctic_like.methods.preference import LOSSES, mixture_problems
from arctic_like.registry.choice import Choice
from arctic_like.trainer.config import LearnerConfig, TrainerConfig
from arctic_like.trainer.preference_config import Mixture, PreferenceConfig, raise_problems

REFERENCE = "reference"
"""The learner's name."""
_CHANGE_THE_BASE = ("pissa", "olora", "loftq")
Divergence = Literal[DIVERGENCES]  # type: ignore[valid-type]


class ReferenceConfig(LearnerConfig):
    """The frozen reference model. What is not stated is the policy's."""

    frozen: bool = True
    """Always; a reference is not trained."""


class ReferencedConfig(TrainerConfig):
    """A recipe of a trainer that compares the policy with a reference. A subclass calls `settle_reference` in
    a validator of its own, among its other checks."""

    reference: ReferenceConfig | None = None
    """The reference model, with keys as at the top level (`model`, `deepspeed`); the policy's initial
    weights unless given."""

    ref_model: Annotated[PartConfig, Choice("model")] | None = None
    """Short form of `reference: {model: …}`."""

    reference_model_deepspeed: dict[str, Any] | None = None
    """Short form of `reference: {deepspeed: …}`: the reference may be divided where the policy is whole."""

    precompute_reference: bool = False
    """Compute the reference's log-probabilities once, before training, and keep them in the data's cache:
    no second model in memory while training."""

    @property
    def compares(self) -> bool:
        """Whether the loss needs a reference."""
        return True

    @property
    def built_apart(self) -> tuple[str, ...]:
        """Learners that are described and not built with the run: a reference that is asked once."""
        return (REFERENCE,) if self.precompute_reference else ()

    @property
    def by_adapter(self) -> bool:
        """Whether the policy without its adapter is the reference."""
        return self.compares and self.reference is None and not self.precompute_reference

    def settle_reference(self) -> None:
        """Raise what is wrong with the reference, and describe the model that the recipe leaves out."""
        raise_problems(type(self).__name__, self._reference_problems())
        if self.reference is None and self.compares and self._needs_a_model:
            model = self.ref_model or self.model
            section = self.reference_model_deepspeed
            # not stated, so a recipe that is written out does not have it
            self.__dict__["reference"] = ReferenceConfig(model=model, deepspeed=section)

    @model_validator(mode="before")
    @classmethod
    def _of_the_policy(cls, data: Any) -> Any:
        """A `reference` that states no model has the policy's."""
        if not isinstance(data, dict) or not isinstance(data.get("reference"), dict):
            return data
        if "model" in data["reference"] or "model" not in data:
            return data
        return {**data, "reference": {**data["reference"], "model": data["model"]}}

    @property
    def _needs_a_model(self) -> bool:
        """Whether the reference is a model of its own: stated, or not to be had from the policy."""
        if self.ref_model is not None:
            return True
        if self.precompute_reference:
            return False
        from arctic_like.model.adapters.config import PROMPTS, kind_of

        peft: dict[str, Any] | None = getattr(self.model, "peft_config", None)
        if peft is None or kind_of(peft) in PROMPTS:
            return True
        return str(peft.get("init_lora_weights", "")).lower().startswith(_CHANGE_THE_BASE)

    def _reference_problems(self) -> Iterator[Problem]:
        stated = [key for key in (REFERENCE, "ref_model", "reference_model_deepspeed")
                  if self.given(key) and getattr(self, key) is not None]  # fmt: skip
        if REFERENCE in stated and len(stated) > 1:
            yield Problem(f"and {stated[1]} are both given", REFERENCE, "keep reference")
        if stated and not self.compares:
            yield Problem("is given, but no loss compares with it", stated[0], "leave it out")
        if self.reference is not None and not self.reference.frozen:
            yield Problem("is false, but a reference is not trained", "reference.frozen",
                          "leave it out")  # fmt: skip
        if self.reference_model_deepspeed is not None:
            from arctic_like.engine.ds_keys import check_deepspeed

            for problem in check_deepspeed(self.reference_model_deepspeed):
                place = ".".join(map(str, ("reference_model_deepspeed", *problem.path)))
                yield Problem(problem.message, place, problem.hint)
        if self.precompute_reference and not self.compares:
            yield Problem("is true, but no loss compares with a reference", "precompute_reference",
                          "leave it out")  # fmt: skip
        if self.precompute_reference and getattr(self.data, "streaming", False):
            yield Problem("is true, but a stream's samples are not known before training",
                          "precompute_reference", "leave it out, or set data.streaming: false")  # fmt: skip


class DPOConfig(ReferencedConfig, PreferenceConfig):
    """A recipe of `type: dpo`."""

    no_effect: ClassVar[dict[str, str]] = {
        **TrainerConfig.no_effect,
        "ignore_label_index": "what is not trained has the label -100 in all data",
    }

    type: str = "dpo"
    """The trainer: pairs of a chosen and a rejected answer."""

    loss: Mixture = Field(default_factory=lambda: {"sigmoid": 1.0})
    """The loss: a name, a list of names, or a map of name to weight, such as `{sigmoid: 1, sft: 0.2}`."""

    beta: Annotated[HumanFloat, Field(gt=0)] = 0.1
    """Strength of the pull towards the reference model."""

    label_smoothing: Annotated[HumanFloat, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a pair's labels are swapped."""

    f_divergence: Divergence = "reverse_kl"
    """The divergence from the reference that stands for the KL (f-DPO)."""

    f_divergence_alpha: HumanFloat = 0.5
    """α of `f_divergence: alpha_divergence`."""

    ld_alpha: Annotated[HumanFloat, Field(ge=0, le=1)] | None = None
    """How much the tokens of the longer answer beyond the length of the shorter one count (LD-DPO)."""

    use_weighting: bool = False
    """Weigh pairs by how likely they are under the policy (WPO)."""

    rpo_alpha: Annotated[HumanFloat, Field(ge=0)] | None = None
    """Weight of the chosen answer's likelihood (RPO): short form of `sft` in `loss`."""

    discopop_tau: Annotated[HumanFloat, Field(gt=0, le=1)] = 0.05
    """Temperature of `discopop`."""

    reward_shift: HumanFloat | None = None
    """δ of `bco_pair`; the mean reward of the global batch unless given, 0 in TRL."""

    ignore_label_index: HumanInt = -100
    """Label of tokens that are not trained. Has no effect: it is -100."""

    @property
    def mixture(self) -> dict[str, float]:
        """Name of a loss → its weight, with `rpo_alpha`."""
        return self.loss | ({"sft": self.rpo_alpha} if self.rpo_alpha else {})

    @property
    def numbers(self) -> dict[str, Any]:
        """The numbers that the losses take by name."""
        from arctic_like.methods.divergence import score_of

        found = {
            "beta": self.beta, "label_smoothing": self.label_smoothing,
            "discopop_tau": self.discopop_tau,
            "score": score_of(self.f_divergence, alpha=self.f_divergence_alpha),
        }  # fmt: skip
        return found if self.reward_shift is None else {**found, "delta": self.reward_shift}

    @property
    def compares(self) -> bool:
        """Whether a loss needs a reference."""
        return any(LOSSES[name].reference for name in self.mixture)

    @model_validator(mode="after")
    def _losses_that_go_together(self) -> Self:
        raise_problems(type(self).__name__, self._loss_problems())
        return self

    @model_validator(mode="after")
    def _one_reference(self) -> Self:
        self.settle_reference()
        return self

    def _loss_problems(self) -> Iterator[Problem]:
        names = list(self.mixture)
        yield from mixture_problems(
            names, place="loss", label_smoothing=self.label_smoothing, weighted=self.use_weighting,
            plain_divergence=self.f_divergence == "reverse_kl",
        )  # fmt: skip
        for name in names:
            if not LOSSES[name].reference and name != "sft":
                kind = name.partition("_")[0].replace("alphapo", "simpo")
                yield Problem(f"is '{name}', which compares with no reference", "loss",
                              f"set type: {kind}")  # fmt: skip
        if self.rpo_alpha is not None and "sft" in self.loss:
            yield Problem("and `sft` in `loss` are the same term", "rpo_alpha", "keep one of them")
        if self.ld_alpha is not None and "sft" in names:
            yield Problem("changes the log-probabilities of answers, and `sft` is their likelihood",
                          "ld_alpha", "leave one of them out")  # fmt: skip
        taken = {number for name in names for number in LOSSES[name].numbers}
        meant = {
            "label_smoothing": (self.label_smoothing > 0, "label_smoothing"),
            "discopop_tau": (self.given("discopop_tau"), "discopop_tau"),
            "reward_shift": (self.reward_shift is not None, "delta"),
        }
        for key, (stated, number) in meant.items():
            if stated and number not in taken:
                able = ", ".join(one for one, loss in LOSSES.items()
                                 if number in loss.numbers and loss.reference)  # fmt: skip
                yield Problem(
                    f"is {getattr(self, key)}, but {', '.join(names)} does not take it", key,
                    f"leave it out, or take a loss out of {able}",
                )  # fmt: skip
        if self.given("f_divergence_alpha") and self.f_divergence != "alpha_divergence":
            yield Problem(f"is given, but f_divergence is {self.f_divergence}", "f_divergence_alpha",
                          "leave it out, or set f_divergence: alpha_divergence")  # fmt: skip
