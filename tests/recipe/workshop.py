"""A family, parts and a trainer of a user's own, for the tests of recipes; and a place to write them."""

from typing import Annotated

from pydantic import Field

from arctic_like.config.base import PartConfig
from arctic_like.config.interval import Interval
from arctic_like.config.values import HumanFloat, HumanInt, NameOrPath, OneOrMany, RecipePath
from arctic_like.registry import Part
from arctic_like.registry.choice import Choice
from arctic_like.trainer.base import Trainer
from arctic_like.trainer.config import TrainerConfig


class Renderer(Part, family="test_renderer"):
    pass


class RendererConfig(PartConfig):
    aliases = {"w": "width"}
    not_yet = {"bounces": "one bounce"}
    no_effect = {"quality": "there is one quality"}
    width: HumanInt = 64
    scene: NameOrPath = ""
    texture: RecipePath | None = None
    every: Interval = Interval()
    bounces: HumanInt = 1
    quality: str = ""


class Flat(Renderer):
    """Flat shading."""

    name = "flat"
    config_type = RendererConfig


class RayConfig(RendererConfig):
    rays: Annotated[HumanInt, Field(ge=1)]


class Ray(Renderer):
    name = "ray"
    config_type = RayConfig


AnyRenderer = Annotated[PartConfig, Choice("test_renderer", short="scene")]


class SceneConfig(TrainerConfig):
    renderers: Annotated[list[AnyRenderer], OneOrMany()] = []
    named: dict[str, AnyRenderer] = {}
    exposure: HumanFloat = 1.0


class SceneTrainer(Trainer):
    """Fits scenes."""

    name = "test_scene"
    config_type = SceneConfig
    test_renderer_factory_type = (Flat, Ray)
    model_factory_type = ()
    data_factory_type = ()

    def loss(self, batch):
        return batch
