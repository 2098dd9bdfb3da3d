"""What a recipe is refused with."""

from __future__ import annotations

from typing import Any

import pytest

from arctic_like import load_recipe
from arctic_like.errors import RecipeError


def refusal(recipe: dict[str, Any]) -> str:
    """The words with which a recipe, given as a map, does not load."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    return str(caught.value)
