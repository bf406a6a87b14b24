"""A problem's text: one Markdown file with fixed headings, and its parts."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib import resources

HEADINGS = ("Why", "Worked example", "Task", "Pitfalls", "Hints", "Solution")
_FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^## (.+)\n", re.MULTILINE)
_PITFALL = re.compile(
    r"^- \*\*(.+?)\*\*: (.+?)(?=^- \*\*|\Z)", re.MULTILINE | re.DOTALL
)
_HINT = re.compile(r"^\d+\. (.+?)(?=^\d+\. |\Z)", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"p(\d\d)_(\w+)\.md")


@dataclass(frozen=True)
class Lesson:
    """One problem of the course.

    Attributes:
      number: its place in the course, from 1.
      name: its name, as in ``state_filter``.
      title: the heading of its text.
      sections: the text under each of ``HEADINGS``.
    """

    number: int
    name: str
    title: str
    sections: dict[str, str]

    @property
    def module(self) -> str:
        """The module with its check."""
        return f"sortal.learn.problems.p{self.number:02}_{self.name}"

    @property
    def file(self) -> str:
        """The name of the file that the learner edits."""
        return f"{self.number:02}_{self.name}.py"

    @property
    def text(self) -> str:
        """What is read before the task is tried, as Markdown."""
        shown = (f"## {name}\n\n{self.sections[name]}" for name in HEADINGS[:4])
        return f"# {self.number}. {self.title}\n\n" + "\n".join(shown)

    @property
    def start(self) -> str:
        """The code that the learner completes."""
        return _code(self.sections["Task"])

    @property
    def solution(self) -> str:
        """A right answer."""
        return _code(self.sections["Solution"])

    @property
    def hints(self) -> tuple[str, ...]:
        """The hints, in the order in which they are given."""
        return tuple(text.strip() for text in _HINT.findall(self.sections["Hints"]))

    @property
    def pitfalls(self) -> dict[str, str]:
        """The name of each pitfall, and what is to be said of it."""
        found = _PITFALL.findall(self.sections["Pitfalls"])
        return {name: re.sub(r"\n +", "\n", text.strip()) for name, text in found}


def _code(section: str) -> str:
    """The last Python block of a section."""
    return _FENCE.findall(section)[-1]


def parse(number: int, name: str, text: str) -> Lesson:
    """A lesson from the text of its Markdown file."""
    head, *parts = _HEADING.split(text)
    bodies = [body.strip() + "\n" for body in parts[1::2]]
    sections = dict(zip(parts[::2], bodies, strict=True))
    return Lesson(number, name, head.strip().removeprefix("# "), sections)


@functools.cache
def lessons() -> tuple[Lesson, ...]:
    """All lessons of the course, in order.

    Example:
      >>> lessons()[3].title
      'The state filter'
    """
    folder = resources.files("sortal.learn") / "problems"
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    named = [(file, found) for file in files if (found := _NAME.fullmatch(file.name))]
    return tuple(
        parse(int(found[1]), found[2], file.read_text(encoding="utf-8"))
        for file, found in named
    )
