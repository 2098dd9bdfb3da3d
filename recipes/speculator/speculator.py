"""Heads that draft a frozen model's next tokens for speculative decoding (docs/speculator.md).

At place t the base has made a hidden state, and token t + 1 is known. Head i, from 0, drafts token t + 2 + i
from the state of the head before it and token t + 1 + i. Parameters and config.json are named as by servers.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from arctic_like import Loss, Trainer
from arctic_like.config.base import wrong
from arctic_like.config.values import HumanInt
from arctic_like.errors import Problem, RecipeError
from arctic_like.kernels.linear_loss import IGNORE, linear_cross_entropy_sum
from arctic_like.kernels.tiles import Head, Logits, tile_rows, tiles
from arctic_like.model.heads import LinearHead, find_head, through_head
from arctic_like.model.huggingface import HFModelConfig, HFModelFactory
from arctic_like.model.isolation import packed_inputs
from arctic_like.model.loading import from_config
from arctic_like.trainer.config import LearnerConfig, TrainerConfig

GATES = ("forget", "input", "output", "cell")
States = tuple[Tensor, Tensor]  # a head's state and its cell, each (rows, length, inner)


class MLPShape(PreTrainedConfig):
    """config.json, with the keys of the program that serves the heads."""

    model_type = "mlp_speculator"


class LSTMShape(MLPShape): ...


class Norm(nn.RMSNorm):
    """x / rms(x), scaled and shifted."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


def of(layers: nn.ModuleList, head: int) -> Any:
    return layers[min(head, len(layers) - 1)]


class Speculator(PreTrainedModel):
    """`n_predict` heads. Where weights are tied, the last of a list of layers serves all that are left."""

    def __init__(self, config: Any, inner: int) -> None:
        super().__init__(config)
        self.inner, heads = inner, range(1 if config.tie_weights else config.n_predict)
        self.head = nn.ModuleList(nn.Linear(inner, config.vocab_size, bias=False) for _ in heads)
        # the base's state is half of what reaches the last head, tokens the rest (arXiv:2404.19124)
        state = 0.5 ** (0.5 / config.n_predict)
        self.token_weight = math.sqrt((1 - state**2) * inner / 2) / state

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=min(module.weight.shape) ** -0.5)
        elif isinstance(module, Norm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(
        self, states: Tensor, tokens: Tensor, targets: Tensor, places: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(sums of -log p(target), (heads,), with gradient; in eval mode the heads' first choices, (heads,
        rows, length)). The logits of one head exist at a time, in training of one tile.

        states: the base's, (rows, length, width). tokens: (rows, length). targets: (heads, rows,
        length), IGNORE where there is none; places: of each head, where there is one, rows end to end.
        """
        state = F.rms_norm(states, states.shape[-1:], eps=1e-6) / 2**0.5
        cell = states.new_zeros(*tokens.shape, self.inner)
        found = []
        for number, (wanted, where) in enumerate(zip(targets.flatten(1), places, strict=True)):
            known, layer = F.pad(tokens[:, 1 + number :], (0, 1 + number)), of(self.head, number)
            state, cell = self.step(number, (state, cell), known)

            def judge(x: Tensor, head: Head, wanted: Any = wanted, where: Any = where) -> States:
                loss = linear_cross_entropy_sum(x, head.weight, wanted, places=where).total
                return loss, x[:, 0].detach() if self.training else first_choice(x, head)

            found.append(through_head(LinearHead(layer), partial(layer, state), judge))
        sums, choices = zip(*found, strict=True)
        return torch.stack(sums), torch.stack(choices).view(len(found), *tokens.shape)


class MLPSpeculatorPreTrainedModel(Speculator):
    """state ← GELU(norm(proj(state) + weight · emb(token))); it has no cell."""

    config_class = MLPShape

    def __init__(self, config: Any) -> None:
        super().__init__(config, inner := config.inner_dim)
        count = len(self.head)
        widths = [config.emb_dim] + [inner] * (min(config.n_predict, max(count, 2)) - 1)
        self.emb = nn.ModuleList(nn.Embedding(config.vocab_size, inner) for _ in range(count))
        self.proj = nn.ModuleList(nn.Linear(width, inner, bias=False) for width in widths)
        self.ln = nn.ModuleList(Norm(inner) for _ in range(count))
        self.post_init()

    def step(self, head: int, states: States, tokens: Tensor) -> States:
        x = of(self.proj, head)(states[0]) + self.token_weight * of(self.emb, head)(tokens)
        return F.gelu(of(self.ln, head)(x)), states[1]


class ArcticLSTMSpeculatorPreTrainedModel(Speculator):
    """The same sums in the gates of an LSTM, which share one embedding of tokens. Weights are tied."""

    config_class = LSTMShape
    written_also = {"forget_emb.0.weight": [f"{gate}_emb.0.weight" for gate in GATES[1:]]}

    def __init__(self, config: Any) -> None:
        super().__init__(config, inner := int(config.inner_dim))
        self.forget_emb = nn.ModuleList([nn.Embedding(config.vocab_size, inner)])
        for gate in GATES:
            layers = [nn.Linear(w, inner, bias=False) for w in (config.input_hidden_dim, inner)]
            self.add_module(f"{gate}_proj", nn.ModuleList(layers))
        self.cell_ln, self.state_ln = (nn.ModuleList([Norm(inner)]) for _ in range(2))
        self.post_init()

    def step(self, head: int, states: States, tokens: Tensor) -> States:
        token = self.token_weight * self.forget_emb[0](tokens)
        x = {g: of(getattr(self, f"{g}_proj"), head)(states[0]) + token for g in GATES}
        cell = states[1] * x["forget"].sigmoid()
        cell = cell + F.gelu(self.cell_ln[0](x["cell"])) * x["input"].sigmoid()
        return F.gelu(self.state_ln[0](cell)) * x["output"].sigmoid(), cell


AutoModel.register(MLPShape, MLPSpeculatorPreTrainedModel, exist_ok=True)
AutoModel.register(LSTMShape, ArcticLSTMSpeculatorPreTrainedModel, exist_ok=True)


def first_choice(hidden: Tensor, head: Head) -> Tensor:
    rows = tile_rows(head)
    logits = Logits(head, rows)
    return torch.cat([logits.of(hidden[part]).argmax(-1) for part in tiles(len(hidden), rows)])


class SpeculatorModelConfig(HFModelConfig):
    """`type: speculator`. `name_or_path` (or `config`) says the base that the heads are made to fit."""

    type: str = "speculator"

    kind: Literal["mlp", "lstm"] = "mlp"
    """The network of the heads."""

    n_predict: HumanInt = Field(default=3, ge=1)
    """Heads: how many tokens are drafted."""

    inner_dim: HumanInt = Field(default=4096, ge=1)
    """Width of the heads."""

    tie_weights: bool = True
    """The heads share their weights, all but the first projection."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.adapted or self.quantization:
            raise wrong("names an adapter; heads are trained whole", hint="leave it out")
        if self.tie_weights < (self.kind == "lstm") or self.tie_weights > (self.n_predict > 1):
            raise wrong("is for several heads, and always for an lstm", place="tie_weights")
        return self


class SpeculatorFactory(HFModelFactory):
    """Draws the heads for a base that is known by its config."""

    name = "speculator"
    config_type = SpeculatorModelConfig

    def shape(self, tokenizer: Any) -> MLPShape:
        own, base = self.config, self.create_config(tokenizer)
        text, width = base.get_text_config(), str(own.inner_dim)
        said: dict[str, Any] = {
            "vocab_size": text.vocab_size, "scale_input": True, "tie_weights": own.tie_weights,
            "n_predict": own.n_predict, "top_k_tokens_per_head": [1] * own.n_predict,
            "n_candidates": own.n_predict, "base_model_archs": base.architectures,
        }  # fmt: skip
        if own.kind == "mlp":
            return MLPShape(emb_dim=text.hidden_size, inner_dim=own.inner_dim, **said)
        said |= {"inner_dim": width, "emb_dim": width, "proj_dim": width, "method": "sum_lstm"}
        return LSTMShape(input_hidden_dim=text.hidden_size, tie_lstm_embs=True, **said)

    def build(
        self, *, tokenizer: Any, seed: int = 0, zero_stage: int = 0, ds_config: Any = None
    ) -> nn.Module:
        zero = ds_config if zero_stage == 3 else None
        shared = {"zero": zero, "auto": "AutoModel", "dtype": self._options()["dtype"]}
        return from_config(self.shape(tokenizer), seed=seed, **shared).train()

    for_weights = build


class SpeculatorConfig(TrainerConfig):
    """A recipe of `type: speculator`."""

    type: str = "speculator"

    base: LearnerConfig = Field(default_factory=lambda: LearnerConfig(frozen=True))
    """The model whose tokens are drafted: frozen, of `model.type: huggingface`."""

    @model_validator(mode="after")
    def _drafts_for_a_frozen_model(self) -> Self:
        if not self.base.frozen or self.base.model.type != "huggingface":
            raise wrong("has to be frozen: true, and of model.type: huggingface", place="base")
        return self


class SpeculatorTrainer(Trainer):
    """The mean of -log p(token) over all drafts: over heads, and places with a trained token to draft."""

    name = "speculator"
    config_type = SpeculatorConfig
    model_factory_type = (SpeculatorFactory, "huggingface")
    weight_unit = "drafts"

    def configure(self) -> None:
        """Find the base's head. Raises RecipeError where the heads are made for another base."""
        base, own = self.learner("base").engine.module, self.module.config
        text = base.config.get_text_config()
        width = vars(own).get("input_hidden_dim", vars(own).get("emb_dim"))
        theirs, mine = (text.hidden_size, text.vocab_size), (width, own.vocab_size)
        if theirs != mine:
            why = f"has (width, tokens) {theirs}, the heads are made for {mine}"
            raise RecipeError(Problem(why, "base.model", "name one in model and base.model"))
        found = find_head(base, device=self.device)
        self.base_head = found.head
        if not found.head:
            raise RecipeError(Problem(f"has no head to draft for: {found.reason}", "base.model"))

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        """(heads, rows, length): trained tokens 2, 3, … places on, within the document; else IGNORE."""
        labels, positions = batch["labels"], batch["position_ids"]
        found = labels.new_full((self.config.model.n_predict, *labels.shape), IGNORE)
        for head, ahead in enumerate(range(2, len(found) + 2)):
            same = positions[:, ahead:] == positions[:, :-ahead] + ahead
            found[head, :, :-ahead] = labels[:, ahead:].where(same, IGNORE)
        return found

    def weight(self, batch: dict[str, Tensor]) -> float:
        """How many drafts."""
        return float((self.targets(batch) != IGNORE).sum())

    def to_device(self, batch: Any) -> Any:
        """The batch on the device with its targets, found on the host, which need not wait for it then."""
        if isinstance(batch, dict):
            targets = self.targets(batch)
            places = [(one.flatten() != IGNORE).nonzero().squeeze(1) for one in targets]
            batch = {**batch, "targets": targets, "places": places}
        return super().to_device(batch)

    def drafted(self, batch: dict[str, Any]) -> tuple[Loss, Tensor, Tensor]:
        """(loss; in eval mode the first choices of the heads and of the base, per place)."""
        engine, tokens = self.learner("base").engine, batch["input_ids"]
        inputs = packed_inputs(engine.module, tokens, batch["position_ids"])

        def see(hidden: Tensor, head: Head) -> States:
            return hidden, hidden[:, 0] if self.module.training else first_choice(hidden, head)

        with torch.no_grad():
            hidden, greedy = through_head(self.base_head, lambda: engine(**inputs), see)
        states, places = hidden.view(*tokens.shape, -1).to(self.module.dtype), batch["places"]
        sums, choices = self.model(states, tokens, batch["targets"], places)
        counts = [len(one) for one in places]
        pairs = enumerate(zip(sums.detach(), counts, strict=True), 1)
        groups = {f"loss/head_{n}": pair for n, pair in pairs}
        loss = Loss(sums.sum() / max(sum(counts), 1), groups=groups)
        return loss, choices, greedy.view(tokens.shape)

    def loss(self, batch: dict[str, Any]) -> Loss:
        """Each head's own mean is logged as `loss/head_1`, …"""
        return self.drafted(batch)[0]

    def validation_step(self, batch: dict[str, Any]) -> Loss:
        """And how often first choices are the base's (`acceptance_1`, …), how many in a row (`accepted`)."""
        loss, choices, greedy = self.drafted(batch)
        there = batch["targets"] != IGNORE
        ahead = [F.pad(greedy[:, n:], (0, n)) for n in range(1, len(there) + 1)]
        right = (choices == torch.stack(ahead)) & there
        pairs = enumerate(zip(right.sum((1, 2)), there.sum((1, 2)), strict=True), 1)
        groups = {**loss.groups, **{f"acceptance_{n}": pair for n, pair in pairs}}
        in_a_row = right.long().cumprod(0).sum(0) * there.all(0)
        groups["accepted"] = (in_a_row.sum(), there.all(0).sum())
        return Loss(loss.mean, groups=groups)
