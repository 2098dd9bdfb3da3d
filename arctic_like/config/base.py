"""The base of everything that a recipe can say: strict (no unknown key) and frozen."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A map in a recipe. Unknown keys are errors; values do not change after validation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True,
        arbitrary_types_allowed=False, protected_namespaces=(),
    )

    aliases: ClassVar[dict[str, str]] = {}
    """Other spellings of keys, old → canonical; replaced before anything is merged."""

    not_yet: ClassVar[dict[str, str]] = {}
    """Declared keys without an effect yet: key → what to use instead. Refused before the run."""

    no_effect: ClassVar[dict[str, str]] = {}
    """Keys that are accepted with a warning: key → why nothing is lost."""


class PartConfig(Config):
    """The config of something chosen by `type:`; stands beside the class that it configures."""

    type: str = ""

    def given(self, key: str) -> bool:
        """Whether the recipe states `key`, as opposed to its default."""
        return key in self.model_fields_set

    def replace(self, **changes: Any) -> Any:
        """A copy with other values, validated; keeps what counts as given."""
        kept = {key: getattr(self, key) for key in self.model_fields_set}
        return type(self).model_validate({**kept, **changes})
