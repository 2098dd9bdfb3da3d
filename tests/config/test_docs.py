"""The texts under fields: what pydantic reads itself, and in the JSON Schema."""

from pydantic._internal._docs_extraction import extract_docstrings_from_cls

from arctic_like.config.base import PartConfig
from arctic_like.config.docs import attribute_docs
from arctic_like.trainer.config import LoggerConfig


class Kettle(PartConfig):
    litres: float = 1.5
    """How much
    it holds."""

    colour: str = "red"
    lid: bool = True
    """Whether it has one."""


class BigKettle(Kettle):
    litres: float = 9.0
    """Very much."""


def test_texts_are_inherited_and_replaced():
    assert attribute_docs(Kettle)["litres"] == "How much it holds."
    assert attribute_docs(BigKettle)["litres"] == "Very much."
    assert attribute_docs(BigKettle)["lid"] == "Whether it has one."
    assert "colour" not in attribute_docs(Kettle)
    properties = BigKettle.model_json_schema()["properties"]
    assert properties["lid"]["description"] == "Whether it has one."


def test_they_are_what_pydantic_reads():
    expected = extract_docstrings_from_cls(LoggerConfig, use_inspect=True)
    own = {key: attribute_docs(LoggerConfig)[key] for key in expected}
    assert own == {key: " ".join(text.split()) for key, text in expected.items()}
    assert len(own) == 4
