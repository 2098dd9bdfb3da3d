"""What each launched process runs: `python -m arctic_like.worker`, told everything by the environment."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from arctic_like.errors import DONE, FAILED, INTERRUPTED, TERMINATED, ArcticError, RelayedError
from arctic_like.stop import StopRequest, install_rank_guards, report_exit


def main() -> int:
    """Run this rank to its end; returns its exit code."""
    from arctic_like.api import execute, recipe_from_environment

    def work() -> int:
        recipe, output_dir, resume = recipe_from_environment()
        result = execute(
            recipe, output_dir=output_dir, resume=resume, stop=StopRequest.from_environment()
        )
        return {2: INTERRUPTED, 15: TERMINATED}.get(result.signal, DONE)

    return exit_code(work)


def exit_code(work: Callable[[], int]) -> int:
    """What `work` returns; of an error its code, after the error was told as a rank tells it."""
    try:
        return work()
    except RelayedError as error:
        return error.exit_code
    except ArcticError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except BaseException:
        rank = os.environ.get("RANK", "0")
        sys.stderr.write(f"error on rank {rank}:\n{traceback.format_exc()}")
        return FAILED


def run_as_rank(main: Callable[[], int]) -> None:
    """Run a launched process to its end, report its code, and leave."""
    install_rank_guards()
    code = main()
    report_exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of libraries (gloo, wandb) must not keep a finished or failed rank alive.
    os._exit(code)


if __name__ == "__main__":
    run_as_rank(main)
