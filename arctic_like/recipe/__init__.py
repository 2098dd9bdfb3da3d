"""Recipes: `load_recipe(path, overrides)` gives a validated `Recipe`."""

from arctic_like.recipe.checks import run_time_refusals, warnings
from arctic_like.recipe.load import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe", "run_time_refusals", "warnings"]
