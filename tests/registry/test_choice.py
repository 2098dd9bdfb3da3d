"""`Annotated[PartConfig, Choice(family)]`: classes by `type:`, exact places, and what goes with what."""

from typing import Annotated

import pytest
from pydantic import ValidationError

from arctic_like.config.base import Config, PartConfig
from arctic_like.config.values import HumanInt
from arctic_like.registry import Part
from arctic_like.registry.choice import Choice
from arctic_like.registry.factory_types import check_factory_types


class Pen(Part, family="test_pen"):
    pass


class InkConfig(PartConfig):
    colour: str = "blue"


class FeltConfig(PartConfig):
    width: HumanInt = 1
    inner: Annotated[PartConfig, Choice("test_pen")] | None = None


class Ink(Pen):
    name = "ink"
    config_type = InkConfig


class Felt(Pen):
    name = "felt"
    config_type = FeltConfig


class ThinFelt(Felt):
    name = "thin_felt"


class Box(Config):
    pen: Annotated[PartConfig, Choice("test_pen", default="ink")] = PartConfig()
    pens: list[Annotated[PartConfig, Choice("test_pen", short="colour", default="ink")]] = []
    spare: Annotated[PartConfig, Choice("test_pen")] | None = None


class FeltUser:
    family, name = "user", "felt_user"
    test_pen_factory_type = (Felt,)


def places(data, **context):
    with pytest.raises(ValidationError) as caught:
        Box.model_validate(data, context=context)
    return [error["loc"] for error in caught.value.errors()]


def test_the_type_decides_the_class():
    box = Box.model_validate(
        {"pen": {"type": "felt", "width": "4Ki"}, "pens": ["red", {"type": "felt"}]}
    )
    assert type(box.pen) is FeltConfig
    assert box.pen.width == 4096
    assert [type(pen) for pen in box.pens] == [InkConfig, FeltConfig]
    assert box.pens[0].colour == "red"
    assert box.spare is None
    assert box.pen.type == "felt"


def test_places_are_exact():
    data = {
        "pens": [
            {},
            {"type": "felt", "width": 1.5},
            {"type": "felt", "inner": {"type": "ink", "x": 1}},
        ]
    }
    assert places(data) == [("pens", 1, "width"), ("pens", 2, "inner", "x")]


def test_unknown_type_and_what_is_near():
    with pytest.raises(ValidationError) as caught:
        Box.model_validate({"pen": {"type": "flet"}})
    (error,) = caught.value.errors()
    assert error["ctx"]["hint"].startswith("did you mean 'felt'?")
    assert "ink" in error["ctx"]["hint"]


def test_a_dump_keeps_the_keys_of_the_class():
    data = {"pen": {"type": "felt", "width": 3}, "pens": [{"colour": "red"}]}
    box = Box.model_validate(data)
    assert box.model_dump()["pen"]["width"] == 3
    assert box.model_dump(exclude_unset=True)["pens"] == [{"colour": "red", "type": "ink"}]
    assert Box.model_validate(box.model_dump()) == box


def test_the_owner_gives_the_default_and_the_limits():
    box = Box.model_validate({"spare": {}}, context={"owners": (FeltUser,)})
    assert type(box.spare) is FeltConfig
    # derived classes are welcome, strangers are not
    Box.model_validate({"spare": {"type": "thin_felt"}}, context={"owners": (FeltUser,)})
    with pytest.raises(
        ValidationError, match=r"'ink' \(Ink\).*'felt_user' \(FeltUser\).*takes 'felt'"
    ):
        Box.model_validate({"spare": {"type": "ink"}}, context={"owners": (FeltUser,)})


def test_without_an_owner_or_default_a_type_is_needed():
    assert Box.model_validate({"spare": {}}).spare == PartConfig()
    with pytest.raises(ValidationError, match="is needed"):
        Box.model_validate({"spare": {"width": 3}})


def test_what_is_no_map():
    for value in (3, [], True):
        assert places({"pen": value}) == [("pen",)]
    assert places({"pens": 3}) == [("pens",)]
    assert places({"pen": {"type": 3}}) == [("pen",)]


def test_schema_is_the_union_of_the_family():
    schema = Box.model_json_schema()
    titles = [entry.get("title") for entry in schema["properties"]["pen"]["anyOf"]]
    assert titles == ["test_pen felt", "test_pen ink", "test_pen thin_felt"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"test_pen_factory_type": 3}, "it holds 3"),
        ({"test_pen_factory_type": (Felt, "flet")}, "did you mean 'felt'"),
        (
            {"test_pne_factory_type": Felt},
            "no family 'test_pne'; did you mean test_pen_factory_type",
        ),
        ({"optimizer_factory_type": (Felt,)}, "family 'test_pen', not of 'optimizer'"),
        ({"checkpoint_engine_type": "deepsped"}, "did you mean 'deepspeed'"),
    ],
)
def test_factory_types_are_checked(body, message):
    with pytest.raises(TypeError, match=message):
        check_factory_types(type("T", (), body))


def test_factory_types_that_are_fine():
    check_factory_types(type("T", (), {
        "test_pen_factory_type": (Felt, "ink"), "test_pen_type": Pen, "model_factory_type": (),
        "optimizer_factory_type": "adamw", "config_type": InkConfig, "colour_type": 3,
    }))  # fmt: skip
