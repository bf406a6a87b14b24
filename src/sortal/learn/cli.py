"""The command ``sortal learn``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sortal.learn.answer import cut
from sortal.learn.judging import Verdict
from sortal.learn.lesson import Lesson, lessons
from sortal.learn.process import judge_apart
from sortal.learn.progress import Progress

_PRINTED, _WIDTH = 4_000, 88


def main(argv: Sequence[str] | None = None, prog: str = "sortal learn") -> int:
    """Runs the command ``sortal learn``.

    Returns:
      The exit code: 0 if all went well, 1 for an answer that is not right, 2 where
      there is none to judge.
    """
    parser = _parser(prog)
    options = parser.parse_args(argv)
    progress = Progress()
    if options.number is None:
        if options.hint is not None or options.check is not None or options.solution:
            parser.error("say which problem, as in: sortal learn 4 --hint")
        _list(progress, prog)
        status = 0
    elif not 1 <= options.number <= len(lessons()):
        parser.error(
            f"there are problems 1 to {len(lessons())}, found {options.number}"
        )
    else:
        status = _with(lessons()[options.number - 1], options, progress, prog)
    for note in progress.notes:
        print(note, file=sys.stderr)
    return status


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Learn Sortal in twenty problems. Without a number, lists them.",
        epilog=f"Begin with: {prog} 1",
    )
    add = parser.add_argument
    add(
        "number",
        nargs="?",
        type=int,
        help="a problem: show it, and write a file to edit",
    )
    does = parser.add_mutually_exclusive_group()
    does.add_argument(
        "--hint", nargs="?", type=int, const=0, metavar="N",
        help="give the next hint, or hint N again",
    )  # fmt: skip
    does.add_argument(
        "--check", nargs="?", const="", metavar="FILE",
        help="judge an answer (by default, the file that was written here)",
    )  # fmt: skip
    does.add_argument("--solution", action="store_true", help="show a right answer")
    return parser


def _with(
    lesson: Lesson, options: argparse.Namespace, progress: Progress, prog: str
) -> int:
    """Does what the options say with one problem; returns the exit code."""
    command = f"{prog} {lesson.number}"
    if options.check is not None:
        return _check(lesson, Path(options.check or lesson.file), progress, prog)
    if options.hint is not None:
        return _hint(lesson, options.hint, progress, command)
    if options.solution:
        print(lesson.solution, end="")  # as it is, for a file
        return 0
    _markdown(lesson.text)
    print()
    _write(lesson)
    print(f"Check it:    {command} --check {lesson.file}")
    print(f"Get a hint:  {command} --hint")
    return 0


def _list(progress: Progress, prog: str) -> None:
    done = [lesson for lesson in lessons() if lesson.name in progress.done]
    for lesson in lessons():
        mark = "x" if lesson in done else " "
        print(f"  [{mark}] {lesson.number:2}  {lesson.title}")
    left = [lesson for lesson in lessons() if lesson not in done]
    print(f"\n{len(done)} of {len(lessons())} done.", end=" ")
    print(f"Next: {prog} {left[0].number}" if left else "That is all of them!")


def _write(lesson: Lesson) -> None:
    """Writes the file to edit, unless there is one."""
    file = Path(lesson.file)
    head = f"# Problem {lesson.number}: {lesson.title}\n"
    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(f"{head}\n{lesson.start}")
        print(f"Your file:   {file}")
    except FileExistsError:
        print(f"Your file:   {file} (it was there already, and is left as it is)")
    except OSError as e:
        print(f"{file} could not be written: {e}. Write it yourself:\n\n{lesson.start}")


def _hint(lesson: Lesson, number: int, progress: Progress, command: str) -> int:
    """Prints one hint: that of a number, or the one after the last that was given."""
    count, given = len(lesson.hints), progress.hints.get(lesson.name, 0)
    if number == 0 and given >= count:
        print(f"You have had all {count} hints ({command} --hint 1 shows the first).")
        print(f"A right answer: {command} --solution")
        return 0
    number = number or given + 1
    if not 1 <= number <= count:
        print(f"there are hints 1 to {count}, found {number}", file=sys.stderr)
        return 2
    _markdown(f"Hint {number} of {count}: {lesson.hints[number - 1]}\n")
    progress.hints[lesson.name] = max(number, given)
    progress.save()
    return 0


def _check(lesson: Lesson, file: Path, progress: Progress, prog: str) -> int:
    waiting = "Checking ..." if sys.stderr.isatty() else ""
    print(waiting, end="", file=sys.stderr, flush=True)
    try:
        verdict, printed = judge_apart(lesson, file)
    except (OSError, UnicodeDecodeError) as e:
        print(f"{file} cannot be read: {e}", file=sys.stderr)
        print(f"{prog} {lesson.number} writes a file to edit.", file=sys.stderr)
        return 2
    finally:
        print("\b \b" * len(waiting), end="", file=sys.stderr, flush=True)
    if printed.strip():
        print(f"Your code printed:\n{_indented(cut(printed.rstrip(), _PRINTED))}\n")
    if not verdict.right:
        _explain(lesson, verdict)
        print(f"\nA hint: {prog} {lesson.number} --hint")
        return 1
    progress.done.add(lesson.name)
    progress.save()
    print(f"Right! Problem {lesson.number}, {lesson.title}, is done.", end=" ")
    left = [other for other in lessons() if other.name not in progress.done]
    later = [other for other in left if other.number > lesson.number]
    if left:
        print(f"Next: {prog} {(later or left)[0].number}")
    else:
        print(f"That was the last of the {len(lessons())}.")
    return 0


def _explain(lesson: Lesson, verdict: Verdict) -> None:
    print(f"Not yet. {verdict.message}")
    rows = {"with": verdict.case, "expected": verdict.expected, "found": verdict.found}
    for head, text in rows.items():
        if text:
            print(f"\n{head}:\n{_indented(text)}")
    if verdict.error:
        print(f"\n{_indented(verdict.error)}")
    if verdict.pitfall:
        print()
        _markdown(f"Pitfall: **{verdict.pitfall}**. {lesson.pitfalls[verdict.pitfall]}")


def _indented(text: str) -> str:
    """The learner's text, moved in; what the terminal cannot show is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    return "\n".join(f"    {line}" for line in text.splitlines())


def _markdown(text: str) -> None:
    """Prints Markdown: laid out on a terminal, as it stands elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown
        from rich.theme import Theme

        # The terminal's own colours and background, which may be dark or light.
        console = Console(theme=Theme({"markdown.code": "bold cyan"}))
        width = min(console.width, _WIDTH)
        console.print(Markdown(text, code_theme="ansi_dark"), width=width)
    else:
        print(text)
