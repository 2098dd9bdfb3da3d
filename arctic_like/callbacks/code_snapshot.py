"""What ran: the recipe's file, the user's code and the state of the git working tree, beside the results."""

from __future__ import annotations

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from arctic_like.callbacks.base import Callback, CallbackConfig
from arctic_like.config.values import HumanInt

if TYPE_CHECKING:
    from arctic_like.trainer.base import Trainer

HIDDEN = (
    "*.env", ".env*", "*.pem", "*.key", "*.p12", "*.pfx", "*.keystore", ".netrc", ".npmrc", ".pypirc",
    "id_rsa*", "id_ed25519*", "*credential*", "*secret*", "*password*", "*.gpg", "*.kdbx", "*token*.json",
)  # fmt: skip
"""Files whose changes are left out of the diff: in lower case, by their name."""

SECRETS = (
    # a name that sounds like a secret, and what it is set to
    re.compile(
        r"""(?i)((?:[\w-]*(?:api|access|private|secret|auth)[_-]?key[\w-]*|[\w-]*(?:token|secret|password"""
        r"""|passwd|credential)s?)["']?\s*[:=]\s*)(?:"[^"\n]{6,}"|'[^'\n]{6,}'|[^\s"'#,(){}\[\]]{12,})"""
    ),
    # what looks like one by itself: Hugging Face, OpenAI, GitHub, AWS, Slack, Google; a URL's password
    re.compile(r"()\b(?:hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
               r"|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}|AIza[\w-]{30,})"),
    re.compile(r"(\w+://[^\s:/@]+:)[^\s@/]{3,}(?=@)"),
    re.compile(r"()-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S),
)  # fmt: skip
REMOVED = "[removed]"


class CodeSnapshotConfig(CallbackConfig):
    """`type: code_snapshot`."""

    type: str = "code_snapshot"

    max_bytes: HumanInt = Field(default=2_000_000, ge=1)
    """Longest diff, and longest file, that is kept; of a longer one the beginning."""

    diff: bool = True
    """Keep the changes of the working tree against the last commit (files that git tracks)."""


class CodeSnapshot(Callback):
    """`type: code_snapshot`: fills `code/` in the run directory: the recipe as written, the file of `code:`,
    `git.txt` (revision, branch, which files are changed) and `changes.diff`.

    What looks like a secret is replaced by `[removed]`, and changes of files that hold such (`.env`, keys)
    are left out. That goes by names and shapes: it is a net, no proof.
    """

    name = "code_snapshot"
    config_type = CodeSnapshotConfig
    config: CodeSnapshotConfig
    main_rank_only = True

    def on_setup_end(self, trainer: Trainer) -> None:
        """Write it; a failure is said and does not end the run."""
        from loguru import logger

        folder = trainer.session.directory.path / "code"
        recipe = trainer.session.recipe
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in filter(None, (recipe.path, trainer.config.code)):
                if Path(path).is_file():
                    self._write(folder / Path(path).name, _read(Path(path), self.config.max_bytes))
            place = Path(trainer.config.code or recipe.path or Path.cwd() / "x").parent
            for name, text in self._of_git(place).items():
                self._write(folder / name, text)
        except (OSError, UnicodeError) as error:
            logger.warning(f"code_snapshot could not write {folder}: {error}")

    def _write(self, path: Path, text: str) -> None:
        limit = self.config.max_bytes
        text = without_secrets(text)
        if len(text.encode()) > limit:
            text = text.encode()[:limit].decode(errors="ignore") + f"\n[cut after {limit} bytes]\n"
        path.write_text(text)

    def _of_git(self, place: Path) -> dict[str, str]:
        """File → text; empty where there is no repository."""
        revision = _git(place, "rev-parse", "HEAD")
        if revision is None:
            return {}
        branch = _git(place, "rev-parse", "--abbrev-ref", "HEAD") or ""
        status = _git(place, "status", "--short") or ""
        found = {"git.txt": f"revision {revision.strip()}\nbranch {branch.strip()}\n{status}"}
        if self.config.diff:
            names = (_git(place, "diff", "HEAD", "--name-only", "-z") or "").split("\0")
            shown = [name for name in names if name and not is_hidden(name)]
            if shown:
                root = Path((_git(place, "rev-parse", "--show-toplevel") or str(place)).strip())
                text = _git(root, "diff", "HEAD", "--no-color", "--no-ext-diff", "--", *shown)
                found["changes.diff"] = text or ""
        return found


def is_hidden(name: str) -> bool:
    """Whether a file's changes are left out, by its name or a folder's."""
    return any(fnmatch(part, pattern) for part in Path(name.lower()).parts for pattern in HIDDEN)


def without_secrets(text: str) -> str:
    """The text with what looks like secrets replaced."""
    for pattern in SECRETS:
        text = pattern.sub(lambda found: found.group(1) + REMOVED, text)
    return text


def _read(path: Path, limit: int) -> str:
    with path.open(errors="replace") as file:
        return file.read(limit + 1)


def _git(place: Path, *arguments: str) -> str | None:
    """What git says; None where it cannot. Nothing is fetched, asked or locked."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=place, capture_output=True, timeout=20,
            check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None
