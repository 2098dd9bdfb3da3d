"""Build parts of DeepSpeed that are compiled on this machine, once: build_ops.py ShareMemComm …

Two ranks that start together would otherwise both wait for the compiler, and a test would time
out. What this device does not need is skipped; a failure here is reported where the part is used.
"""

from __future__ import annotations

import logging
import os
import sys
import time


def main() -> None:
    # The compiler driver, ninja, is a package beside this Python.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    from arctic_like.engine.op_locks import remove_stale_locks

    for lock in remove_stale_locks():
        print(f"removed {lock}: a process that was killed left it", file=sys.stderr)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    for name in sys.argv[1:]:
        start = time.perf_counter()
        try:
            builder = get_accelerator().create_op_builder(f"{name}Builder")
            if builder is None or not builder.is_compatible():
                continue
            builder.load(verbose=False)
        except Exception as error:
            print(f"{name}: not built here ({str(error).splitlines()[0]})", file=sys.stderr)
        else:
            print(f"{name}: ready ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
