"""Stands between the command and what it launches, so that no process outlives the command.

Started as `python -S -E guard.py FD FOLDER PROGRAM …` in a session of its own. It runs PROGRAM in
its own process group and reads from FD, a pipe whose other end only the command holds: at the end
of file the command is gone, also by kill -9; the guard removes the command's private FOLDER and
kills its whole group, itself included. Otherwise it passes the program's exit code on (128 + n
where signal n killed it).

Standard library only, and only modules that load in milliseconds: the guard stands before all else.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys


def kill_group_when_closed(pipe: int, folder: str) -> None:
    """Block until nobody holds the other end of `pipe`, then kill this process group."""
    while os.read(pipe, 1):
        pass
    try:
        for name in os.listdir(folder):
            os.unlink(os.path.join(folder, name))
        os.rmdir(folder)
    except OSError:
        pass  # a few bytes stay behind; ending the processes matters more
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Run the program of the command line and return its exit code."""
    pipe, folder, program = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    os.set_inheritable(pipe, False)
    child = os.fork()
    if child == 0:
        try:
            os.execvp(program[0], program)
        except OSError as error:
            sys.stderr.write(f"{program[0]}: {error.strerror}\n")
        os._exit(127)
    # The program alone answers to these; the command counts on the guard to stay to the end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _thread.start_new_thread(kill_group_when_closed, (pipe, folder))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the watching thread still blocks in its read
