"""Installed packages that announce parts through the entry-point group `arctic_like.plugins`.

Each entry point names a module (or anything in it); importing it registers its parts. They are
loaded
only when a name is not found among the built-in and registered ones, or when all names are listed.
"""

from __future__ import annotations

from arctic_like.errors import RecipeError

GROUP = "arctic_like.plugins"
_loaded = False


def load_plugins() -> None:
    """Import all announced packages, once. Raises RecipeError naming the one that fails."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    from importlib.metadata import entry_points  # 50 ms, and rarely needed

    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            _loaded = False
            package = point.dist.name if point.dist else point.value
            raise RecipeError(
                f"the installed plug-in {point.name!r} of package {package!r} cannot be imported: "
                f"{type(error).__name__}: {error}"
            ) from error
