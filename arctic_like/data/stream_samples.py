"""The samples of a stream by their number: blocks found, waited for, made ahead, and removed.

Every rank walks the same chain of blocks; one process a machine makes them, a block ahead of the one
that is read. Nothing is agreed on between ranks: a block's files say where the next one begins.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import util
from typing import TYPE_CHECKING, Any

import numpy as np

from arctic_like.data import cache
from arctic_like.data.base import Sample, SampleSet
from arctic_like.data.mix import SourcedSamples
from arctic_like.data.order import key_of, permute
from arctic_like.data.stream import BlockMaker, StreamState
from arctic_like.errors import WRONG, ArcticError, RecipeError, RunError

if TYPE_CHECKING:
    from numpy.typing import NDArray

ENDLESS = 1 << 40
"""Samples that are said to be in a stream."""
_LATE_SECONDS = 1.0
_OPEN_BLOCKS = 4


@dataclass(frozen=True)
class Located:
    """A sample as a worker finds it, without knowing the chain of blocks.

    number: in the stream. index: in its block. samples: the block's set, pickled (a few paths).
    """

    number: int
    index: int
    block: int
    samples: bytes = field(repr=False)

    def __str__(self) -> str:
        return str(self.number)


@dataclass(frozen=True)
class _Block:
    state: StreamState
    following: StreamState
    samples: SampleSet | None
    pickled: bytes

    @property
    def first(self) -> int:
        return self.state.samples

    @property
    def end(self) -> int:
        return self.following.samples


class StreamSamples(SampleSet):
    """Sample n is the n-th of the run; they are asked for in about ascending order.

    maker: makes blocks. seed: shuffles each. prepares: this process makes them ahead of time, by a
    child of its own; else another process does. cleans: it removes those that were passed.
    told: tokens get the numbers of their sources.
    """

    def __init__(
        self, maker: BlockMaker, *, seed: int, prepares: bool = True, told: bool = False
    ) -> None:
        self.maker = maker
        self.seed = seed
        self.told = told
        self._since = time.time()
        self._kept: int | None = None
        self._preparer = _Preparer(maker) if prepares else None
        self._blocks: list[_Block] = []
        self._opened: dict[int, SampleSet] = {}
        self._begin(maker.first)

    def __getstate__(self) -> dict[str, Any]:
        return {"_opened": {}, "_blocks": []}  # a worker gets located samples, and reads them

    def __len__(self) -> int:
        return ENDLESS

    @property
    def lengths(self) -> NDArray[np.int64]:  # type: ignore[override]
        """Nobody knows them: raises RecipeError. `lengths_of` knows those that were read."""
        raise RecipeError(
            "the samples of a stream are not known before they are read; "
            "to look at them, say data.streaming=false and read a slice"
        )

    weights = lengths

    # --- what the loader asks

    def lengths_of(self, numbers: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of some samples, int64. Waits until their blocks are there."""
        found = []
        for number in np.asarray(numbers).tolist():
            block, index = self._find(number)
            assert block.samples is not None
            found.append(int(block.samples.lengths[index]))
        return np.array(found, dtype=np.int64)

    def located(self, numbers: Sequence[int]) -> list[Located]:
        """Where some samples are. Waits until their blocks are there."""
        found = []
        for number in numbers:
            block, index = self._find(number)
            found.append(Located(number, index, block.state.block, block.pickled))
        return found

    def __getitem__(self, index: int | Located) -> Sample:
        at = self.located([index])[0] if isinstance(index, int) else index
        return self._set(at)[at.index]

    def sample_id(self, index: int | Located) -> str:
        """Where the sample comes from, as long as its block is there."""
        with contextlib.suppress(Exception):
            if not isinstance(index, Located):
                known = [b for b in self._blocks if b.first <= index < b.end]
                if not known:
                    return f"sample {index} of the stream"
                index = Located(index, self._index(known[0], index), known[0].state.block,
                                known[0].pickled)  # fmt: skip
            return self._set(index).sample_id(index.index)
        return f"sample {index} of the stream"

    def _set(self, at: Located) -> SampleSet:
        if at.block not in self._opened:
            while len(self._opened) >= _OPEN_BLOCKS:
                self._opened.pop(min(self._opened))
            self._opened[at.block] = pickle.loads(at.samples)
        return self._opened[at.block]

    # --- what a checkpoint asks

    def state(self, position: int) -> dict[str, Any]:
        """All that a resume at `position` needs: where the block begins that it lies in. That block
        is kept until the next call."""
        state = self._start
        for block in self._blocks:
            if block.first <= position:
                state = block.state if position < block.end else block.following
        self._kept = state.block
        return state.as_dict()

    def take_up(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._begin(StreamState.from_dict(state))

    def _begin(self, state: StreamState) -> None:
        self._start = self._fruitful = state
        self._blocks, self._opened = [], {}
        if self._preparer is not None:
            self._preparer.forget()

    def release(self, position: int) -> None:
        """Nothing before `position` is asked for any more, by any rank: blocks before it may go."""
        while len(self._blocks) > 1 and self._blocks[0].end <= position:
            self._blocks.pop(0)
        if self._preparer is None or not self._blocks:
            return
        here = self._blocks[0].state.block
        for folder in self.maker.folder.glob("block-*"):
            number = folder.name.removeprefix("block-")
            if number.isdigit() and int(number) < here and int(number) != self._kept:
                with contextlib.suppress(OSError):  # at once: half a block must not look whole
                    gone = folder.rename(folder.with_name(f"removed-{number}"))
                    shutil.rmtree(gone, ignore_errors=True)

    # --- the chain

    def _find(self, number: int) -> tuple[_Block, int]:
        known = self._blocks[0].first if self._blocks else self._start.samples
        if number < known:  # only a run that looks at its first batch again asks for it
            self._begin(self.maker.first)
        while not self._blocks or number >= self._blocks[-1].end:
            self._blocks.append(self._next())
        block = next(b for b in reversed(self._blocks) if b.first <= number)
        return block, self._index(block, number)

    def _index(self, block: _Block, number: int) -> int:
        key = key_of(self.seed, block.state.block)
        return int(permute([number - block.first], size=block.end - block.first, key=key)[0])

    def _next(self) -> _Block:
        state = self._blocks[-1].following if self._blocks else self._start
        if self._preparer is not None:
            self._preparer.ask(state)
        self._wait(state)
        prepared, sources = self.maker.prepared(state)
        samples: SampleSet | None = prepared.samples if prepared else None
        count = len(samples) if samples is not None else 0
        if prepared and self.told:
            samples = SourcedSamples(prepared.samples, sources)
        following = self.maker.following(state, count)
        if self._preparer is not None:
            self._preparer.ask(following)
        self._tell(state, following, prepared)
        return _Block(state, following, samples, pickle.dumps(samples))

    def _wait(self, state: StreamState) -> None:
        from loguru import logger

        started = time.monotonic()
        alive = self._preparer.check if self._preparer else None
        for _, _, entry in self.maker.parts(state):
            cache.await_entry(entry, since=self._since, alive=alive)
        waited = time.monotonic() - started
        if self._blocks and waited > _LATE_SECONDS:
            logger.info(
                f"training waited {waited:.1f} s for block {state.block} of the stream; "
                "more processes make it faster (data.num_proc)"
            )

    def _tell(self, state: StreamState, following: StreamState, prepared: Any) -> None:
        """What is worth knowing of a block; raises RecipeError where rows give no sample at all."""
        from loguru import logger

        if following.samples > state.samples:
            self._fruitful = following
        since = [source.passes for source in self._fruitful.sources]
        if min(s.passes - then for s, then in zip(following.sources, since, strict=True)) > 1:
            raise RecipeError(
                "the stream's sources were read from end to end and gave no sample: their rows have "
                "no trained token, or are longer than data.max_length"
            )
        if self._preparer is None:
            return
        for number, _, entry in self.maker.parts(state):
            facts = cache.facts(entry)
            if facts["bad"]:
                logger.warning(
                    f"block {state.block}: {facts['bad']:,} rows of {facts['source']} cannot be used, "
                    f"the first: {facts['bad_examples'][0]}"
                )
            if following.sources[number].passes and not state.sources[number].passes:
                logger.info(
                    f"{facts['source']} was read to its end, and is read again from its start"
                )
        if prepared and not self._blocks:
            facts = prepared.facts
            logger.info(
                f"block {state.block} of the stream: {facts['documents']:,} documents → "
                f"{facts['samples']:,} samples of up to {facts['max_length']:,} tokens, "
                f"{facts['fill_rate']:.1%} filled"
            )


class _Preparer:
    """A child process that makes the blocks it is asked for. It ends with this process."""

    def __init__(self, maker: BlockMaker) -> None:
        self._maker = maker
        self._process: Any = None
        self._asked: set[int] = set()

    def ask(self, state: StreamState) -> None:
        """Make a block, after those that were asked for before."""
        if self._process is None:
            self._begin()
        if state.block not in self._asked:
            self._asked.add(state.block)
            with contextlib.suppress(OSError):  # `check` tells why it is gone
                self._pipe.send(state)

    def forget(self) -> None:
        """Blocks may have to be made again."""
        self._asked.clear()

    def check(self) -> None:
        """Raise what went wrong in the child, RunError if it is gone."""
        if self._process is None:
            return
        with contextlib.suppress(EOFError, OSError):
            if self._pipe.poll():
                raise self._pipe.recv()
        if self._process.exitcode is not None:
            code = self._process.exitcode
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise RunError(
                f"the process that prepares the stream is gone ({how})\n"
                "    the system ends processes that take too much memory; lower "
                "data.streaming_window or data.num_proc, and resume"
            )

    def _begin(self) -> None:
        # forked, so that the tokenizer need not be read again; like torch's data workers
        context = multiprocessing.get_context("fork")
        theirs, self._pipe = context.Pipe()
        # no daemon: it may have tokenising processes of its own
        self._process = context.Process(
            target=_prepare_blocks, args=(self._maker, theirs, self._pipe), name="stream"
        )
        self._process.start()
        theirs.close()
        util.Finalize(self, _end, args=(self._process, self._pipe), exitpriority=20)


def _end(process: Any, connection: Any) -> None:
    connection.close()
    process.terminate()
    process.join(5)


def _prepare_blocks(maker: BlockMaker, pipe: Any, parents: Any) -> None:
    """The child: one block after another, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # the threads of the parent's tokenizer are not here, and waiting for them would never end
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parents.close()
    from loguru import logger

    threading.Thread(target=_follow_parent, args=(os.getppid(),), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            state = pipe.recv()
            try:
                maker.make(state)
            except ArcticError as error:
                told: ArcticError = RecipeError(str(error)) if error.exit_code == WRONG else error
                pipe.send(told)
            except Exception as error:
                logger.exception(error)
                pipe.send(RunError(f"preparing the stream failed: {type(error).__name__}: {error}"))


def _follow_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
