"""The problems, in the order of their names: a Markdown text and a check of each.

A check is a function ``check(answer, rng)``. It calls what the learner wrote with
arguments drawn from ``rng``, and raises ``Wrong`` if the result is not right. The name
of a pitfall in ``Wrong`` is one of those that the text lists under "Pitfalls".
"""
