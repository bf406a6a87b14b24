"""What a learner has done: one small JSON file in the user's data folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

OVERRIDE = "SORTAL_LEARN_PROGRESS"
"""The environment variable with another path of the file."""

# The file cannot be had, or there is no home folder, or it holds something else.
_UNREADABLE = (
    OSError, RuntimeError,
    ValueError, LookupError, TypeError, AttributeError,
)  # fmt: skip


def place() -> Path:
    """Where the file is."""
    if given := os.environ.get(OVERRIDE):
        return Path(given)
    local = os.environ.get("LOCALAPPDATA") if os.name == "nt" else None
    data = os.environ.get("XDG_DATA_HOME") or local
    return Path(data or Path("~/.local/share").expanduser()) / "sortal" / "learn.json"


class Progress:
    """The problems that are done, and how many hints were given of each.

    A file that cannot be read counts as none, and one that cannot be written is left
    as it is; ``notes`` says so.

    Args:
      file: where it is; by default ``place()``.

    Attributes:
      done: names of problems.
      hints: the number of hints given, by name.
      notes: what went wrong with the file, in sentences.
    """

    def __init__(self, file: Path | None = None):
        self.done: set[str] = set()
        self.hints: dict[str, int] = {}
        self.notes: list[str] = []
        self.file = file
        try:
            self.file = file or place()
            found = json.loads(self.file.read_text(encoding="utf-8"))
            done = {str(name) for name in found["done"]}
            hints = {str(name): int(n) for name, n in found["hints"].items()}
            self.done, self.hints = done, hints
        except FileNotFoundError:
            pass
        except _UNREADABLE as e:
            self._note("read", e)

    def save(self) -> None:
        """Writes the file, or adds a note where that cannot be done."""
        if self.file is None:  # there is no place for it, as was noted
            return
        data = {"done": sorted(self.done), "hints": self.hints}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            new = self.file.with_name(f"{self.file.name}.{os.getpid()}")
            new.write_text(json.dumps(data, indent=1), encoding="utf-8")
            new.replace(self.file)
        except OSError as e:
            self._note("saved", e)

    def _note(self, what: str, error: Exception) -> None:
        self.notes.append(
            f"Progress could not be {what} ({type(error).__name__}: {error}). The "
            f"environment variable {OVERRIDE} names another file for it."
        )
