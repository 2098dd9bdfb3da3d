"""Sequence parallelism: several ranks share the tokens of a row, and a layer's attention its heads.

What DeepSpeed-Ulysses does (Jacobs et al. 2023, arXiv:2309.14509): every rank keeps a contiguous part of
each row; for the attention alone the ranks of a group exchange parts of rows for heads, so that each sees
whole rows of its heads, and exchange them back. Knows tensors and process groups; no model, no recipe.
"""

from arctic_like.sequence.attention import ulysses
from arctic_like.sequence.group import SequenceGroup
from arctic_like.sequence.rows import block_mask, borders_of

__all__ = ["SequenceGroup", "block_mask", "borders_of", "ulysses"]
