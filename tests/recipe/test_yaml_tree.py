"""YAML with lines, by the rules of YAML 1.2; dumps read back to the same values."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arctic_like.errors import RecipeError
from arctic_like.recipe.tree import Origin
from arctic_like.recipe.yaml_tree import dump_yaml, parse_yaml


def parse(text):
    problems = []
    node = parse_yaml(text, Origin("f.yaml", 1), problems)
    return node, problems


def plain(text):
    node, problems = parse(text)
    assert not problems
    return node.plain()


def test_scalars_mean_what_they_look_like():
    text = "{a: no, b: on, c: yes, d: 1e-5, e: 1:30, f: 2024-01-01, g: true, h: 0x10, i: 1_000, j: ~, k: }"
    assert plain(text) == {
        "a": "no", "b": "on", "c": "yes", "d": 1e-5, "e": "1:30", "f": "2024-01-01", "g": True,
        "h": 16, "i": "1_000", "j": None, "k": None,
    }  # fmt: skip
    assert plain("[0, -0, 1., .5, -3, +4, 5e3, .inf, '012', 0o17, 0.1]") == [
        0, 0, 1.0, 0.5, -3, 4, 5000.0, math.inf, "012", 15, 0.1
    ]  # fmt: skip


def test_leading_zeros_are_refused():
    _, (problem,) = parse("a:\n  b: 012\n")
    assert (problem.place, problem.line) == ("a.b", 2)
    assert "012" in problem.message
    assert "write 12" in problem.hint


def test_every_value_knows_its_line():
    node, _ = parse("a: 1\nb:\n  - x\n  - c: 2\n\n    d: 3\n")
    assert node.child("a").origin.line == 1
    assert node.child("b").origin.line == 2
    assert node.child("b").child(0).origin.line == 3
    assert node.child("b").child(1).child("d").origin.line == 6


def test_duplicate_keys_name_both_lines():
    node, (problem,) = parse("a: 1\nb: 2\na: 3\n")
    assert problem.line == 3
    assert "line 1" in problem.message
    assert node.plain() == {"a": 1, "b": 2}


def test_anchors_and_merges():
    assert plain("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\nz: *x\n") == {
        "x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}, "z": {"a": 1, "b": 2},
    }  # fmt: skip
    _, problems = parse("a: &a\n  b: *a\n")
    assert "contains itself" in problems[0].message


@pytest.mark.parametrize(
    ("text", "line"),
    [("a: [1, 2", 1), ("a: 1\n\tb: 2", 2), ("a: b: c", 1), ("a: 'x", 1), ("a: 1\n b: 2", 2),
     ("a: *nope", 1), ("- a\nb: 1", 2), ("a: %x", 1), ("a: 1\n---\nb: 2", 2)],
)  # fmt: skip
def test_bad_yaml_says_where(text, line):
    with pytest.raises(RecipeError) as caught:
        parse(text)
    (problem,) = caught.value.problems
    assert "not valid YAML" in problem.message
    assert "column" in problem.message
    assert problem.line in (line, line + 1)


def test_tags_are_refused():
    _, problems = parse("a: !!python/object:os.system x")
    assert "plain values" in problems[0].message


TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["no", "on", "012", "1e-5", "1:30", "~", "null", "2024-01-01", "<<", "=", "a: b",
                     "# x", "- x", "0x1", "${env:X}", "1_000", ".inf", "true", " x ", "x\ny", "é"]),
)  # fmt: skip
SCALARS = st.one_of(TEXTS, st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False))
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(TEXTS.filter(lambda t: t != "<<"), inner, max_size=4),
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda t: t != "<<"), TREES, max_size=4)
)
def test_a_dump_reads_back(tree):
    assert plain(dump_yaml(tree)) == tree
