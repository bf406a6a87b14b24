"""The parts of a problem's text are found under its headings."""

from __future__ import annotations

from sortal.learn.lesson import lessons, parse

TEXT = """# Title here

## Why

Because.

## Worked example

```python
>>> 1 + 1
2
```

## Task

Do it.

```python
def f(): ...
```

## Pitfalls

- **one `thing`**: A sentence
  on two lines.
- **another**: Second.

## Hints

1. First,
   longer.
2. Second.

## Solution

```python
def f(): return 1
```
"""
LESSON = parse(7, "some_name", TEXT)


def test_the_parts_of_a_text_are_found() -> None:
    assert LESSON.title == "Title here"
    assert LESSON.start == "def f(): ...\n"
    assert LESSON.solution == "def f(): return 1\n"
    assert LESSON.hints == ("First,\n   longer.", "Second.")
    pitfalls = {"one `thing`": "A sentence\non two lines.", "another": "Second."}
    assert LESSON.pitfalls == pitfalls


def test_a_lesson_is_read_without_hints_and_solution() -> None:
    assert LESSON.text.startswith("# 7. Title here\n\n## Why\n\nBecause.")
    assert "## Pitfalls" in LESSON.text
    assert "## Hints" not in LESSON.text
    assert "return 1" not in LESSON.text


def test_the_names_of_file_and_module_follow_from_number_and_name() -> None:
    assert LESSON.file == "07_some_name.py"
    assert LESSON.module == "sortal.learn.problems.p07_some_name"


def test_the_fourth_problem_is_that_of_the_state_filter() -> None:
    fourth = lessons()[3]
    assert fourth.name == "state_filter"
    assert "state_filter_count(seed, x, hidden)" in fourth.start
