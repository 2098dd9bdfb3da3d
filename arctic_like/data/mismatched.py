"""Prompts with answers of other prompts, by which KTO estimates a divergence (arXiv:2402.01306, section 4.1).

Behind every judged answer of a set stands a second document: its prompt with the answer of the one before it
in the set, that of the first being the last one's. The set is what is left after filtering, in its order, so
that what a document holds depends on neither ranks nor batches nor packing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from arctic_like.data.packing import IGNORED, Pieces

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from arctic_like.data.base import Sample

PIECES = 3
"""Of a unit: the judged document, the prompt again, the other answer."""


def with_mismatched(
    judged: Pieces, prompts: NDArray[np.int64], *, max_length: int
) -> tuple[Pieces, int]:
    """(`PIECES` for each judged document, how many of the other answers had to be cut).

    judged: the documents of a set, cut, in its order. prompts: (len(judged),) tokens before each answer, in
    the uncut document. A prompt with another answer has at most `max_length` tokens: such an answer loses
    its end.
    """
    begins = np.maximum(prompts, judged.start)
    prompt_lengths = begins - judged.start
    answer_lengths = judged.length - prompt_lengths
    other = np.roll(np.arange(len(judged)), 1)
    room = np.minimum(answer_lengths[other], max_length - prompt_lengths)
    pieces = Pieces(
        np.stack([judged.document, judged.document, judged.document[other]], axis=1).reshape(-1),
        np.stack([judged.start, judged.start, begins[other]], axis=1).reshape(-1),
        np.stack([judged.length, prompt_lengths, room], axis=1).reshape(-1),
    )
    return pieces, int((room < answer_lengths[other]).sum())


def join_mismatched(sample: Sample, lengths: NDArray[np.int64], opens: NDArray[np.bool_]) -> None:
    """Make one document of each prompt and its other answer, in place: `segment_ids`, positions, and the
    labels, of which only the answer's are trained.

    sample: its pieces, laid as documents of their own. lengths, opens: (pieces,) tokens of each, and whether
    the first of them is trained.
    """
    numbers = np.arange(len(lengths)) // PIECES * 2 + (np.arange(len(lengths)) % PIECES > 0)
    sample["segment_ids"] = np.repeat(numbers, lengths)
    ends = np.cumsum(lengths)
    for at in range(1, len(lengths), PIECES):
        border, end, prompt = int(ends[at]), int(ends[at + 1]), int(lengths[at])
        sample["position_ids"][border:end] += prompt
        sample["labels"][border - prompt : border] = IGNORED
        if prompt and opens[at + 1]:  # the prompt predicts it
            sample["labels"][border] = sample["input_ids"][border]
