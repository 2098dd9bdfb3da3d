"""Where messages go, in processes of their own (the set-up is the process's)."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAD = """
import logging, sys, warnings
from pathlib import Path
from loguru import logger
from arctic_like.logs import close_logging, setup_logging
folder = Path(sys.argv[1])
"""


def run(folder, code):
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code, str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


def test_console_and_file(tmp_path):
    done = run(tmp_path, """
setup_logging(output_dir=folder)
logger.debug("fine [b]detail[/b]")
logger.info("hello {} [red]", 1)
logger.warning("careful")
logging.getLogger("my.trainer").info("mine")
warnings.warn("ours")
warnings.warn("later", DeprecationWarning)
""")  # fmt: skip
    assert done.stdout.splitlines() == [
        "hello 1 [red]",
        "warning: careful",
        "mine",
        "warning: ours",
    ]
    assert done.stderr == ""
    kept = (tmp_path / "rank-0.log").read_text()
    for text in ("fine [b]detail[/b]", "hello 1 [red]", "careful", "mine", "ours", "later"):
        assert text in kept


@pytest.mark.parametrize(
    ("rank", "printing", "filing"),
    [(0, "(0,)", "'*'"), (1, "(0,)", "'*'"), (1, "'*'", "[0]"), (1, "[1]", "[1]")],
)
def test_ranks(tmp_path, rank, printing, filing):
    done = run(tmp_path, f"""
setup_logging(
    rank={rank}, output_dir=folder, print_output_ranks={printing}, file_output_ranks={filing}
)
logger.info("hello")
""")  # fmt: skip
    prints = {"(0,)": rank == 0, "'*'": True, "[1]": rank == 1}[printing]
    origin = f"[rank {rank}] " if rank else ""
    assert done.stdout == (f"{origin}hello\n" if prints else "")
    files = {"'*'": True, "[0]": rank == 0, "[1]": rank == 1}[filing]
    assert (tmp_path / f"rank-{rank}.log").exists() == files


def test_nothing_is_written_before_the_first_message(tmp_path):
    run(tmp_path, "setup_logging(output_dir=folder / 'logs')")
    assert list(tmp_path.iterdir()) == []


def test_libraries_say_only_warnings_on_the_console(tmp_path):
    """Handlers that a library adds, before or after, and its refusal to propagate, do nothing."""
    done = run(tmp_path, """
def as_libraries_do(name):
    library = logging.getLogger(name)
    library.addHandler(logging.StreamHandler(sys.stdout))
    library.setLevel(logging.INFO)
    library.propagate = False
    return library
early = as_libraries_do("transformers")
setup_logging(output_dir=folder)
late = as_libraries_do("DeepSpeed")
for library in (early, late):
    speak = "{0}.info('chatter of {1}'); {0}.warning('warning of {1}')"
    exec(compile(speak.format("library", library.name), "/x/site-packages/y.py", "exec"))
close_logging()
logger.remove()
early.info("given back")
""")  # fmt: skip
    said = done.stdout.splitlines()
    assert said == [
        "warning: warning of transformers",
        "warning: warning of DeepSpeed",
        "given back",
    ]
    kept = (tmp_path / "rank-0.log").read_text()
    assert kept.count("chatter of") == 2


@pytest.mark.full
def test_the_real_deepspeed_and_transformers(tmp_path):
    done = run(tmp_path, """
setup_logging(output_dir=folder)
from deepspeed.utils import logger as theirs
import transformers
theirs.setLevel(logging.INFO)
theirs.info("chatter")
theirs.warning("a warning")
transformers.utils.logging.get_logger("transformers.x").warning_once("another")
""")  # fmt: skip
    assert "chatter" not in done.stdout
    assert done.stdout.count("a warning") == 1
    assert done.stdout.count("another") == 1
    assert done.stderr == ""


def test_level_and_exceptions(tmp_path):
    done = run(tmp_path, """
setup_logging(level="WARNING")
setup_logging(level="ERROR")
logger.warning("not shown")
try:
    {}["x"]
except KeyError:
    logger.exception("failed")
""")  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[0] == "error: failed"
    assert lines[-1] == "KeyError: 'x'"
    assert "not shown" not in done.stdout


def test_sinks_of_the_users_process_stay(tmp_path):
    done = run(tmp_path, """
logger.add(sys.stderr, format="user {message}")
setup_logging()
logger.info("hello")
close_logging()
logger.info("after")
""")  # fmt: skip
    assert done.stdout == "hello\n"
    assert done.stderr == "user hello\nuser after\n"
