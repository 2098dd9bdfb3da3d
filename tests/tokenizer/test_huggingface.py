"""Tokenizers from folders, and the sentences for those that cannot be had."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from arctic_like.errors import RecipeError
from arctic_like.registry import lookup
from arctic_like.tokenizer.byte import byte_tokenizer


def factory(kind: str = "huggingface", **config):
    part = lookup("tokenizer", kind)
    return part(part.config_type(type=kind, **config))


def word_tokenizer(**special):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2, "?": 3}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", **special)


def test_the_models_own_tokenizer_unless_another_is_named(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "model")
    word_tokenizer(eos_token="</s>").save_pretrained(tmp_path / "words")
    model = str(tmp_path / "model")
    assert len(factory().build(model)) == 262
    named = factory(name_or_path=str(tmp_path / "words")).build(model_name_or_path=model)
    assert len(named) == 4


def test_padding_is_the_end_where_there_is_none(tmp_path):
    word_tokenizer(eos_token="</s>", padding_side="left").save_pretrained(tmp_path)
    tokenizer = factory().build(str(tmp_path))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.padding_side == "right"


@pytest.mark.parametrize(
    ("config", "model", "expected"),
    [
        ({}, None, "no tokenizer is named"),
        ({}, "/no/such/folder", "cannot be loaded"),
        ({"name_or_path": "/no/such/folder"}, None, "'/no/such/folder' cannot be loaded"),
    ],
)
def test_sentences(config, model, expected):
    with pytest.raises(RecipeError, match=expected) as caught:
        factory(**config).build(model)
    assert "tokenizer.name_or_path" in str(caught.value)


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="no end-of-sequence token"):
        factory().build(str(tmp_path))


def test_chat_template_as_text_and_as_file(tmp_path):
    template = "{{ messages[0]['content'] }}"
    path = tmp_path / "chat.jinja"
    path.write_text(template)
    for given in (template, str(path)):
        assert factory("byte", chat_template=given).build().chat_template == template
    with pytest.raises(RecipeError, match="neither a Jinja template nor a file"):
        factory("byte", chat_template=str(tmp_path / "none.jinja")).build()


def test_recipes_are_strict():
    for kind, wrong in (("byte", {"revision": "x"}), ("huggingface", {"name": "x"})):
        with pytest.raises(ValueError, match="Extra inputs"):
            factory(kind, **wrong)
