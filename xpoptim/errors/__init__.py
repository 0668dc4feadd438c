"""What is said when something is wrong: by a `TraceError`, else a plain ``TypeError``, ``ValueError`` or the like.

- ``habits``: what to write instead of what other libraries take
- ``hints``: the near name, for a wrong one
"""


class TraceError(TypeError):
    """A rule does something that cannot be traced.

    The message names the rule and the argument or function. A rule may use the operators and the
    functions of its ``xp`` argument only; it may branch on fields annotated ``bool`` or ``Literal`` and on nothing
    else, and it may not write to its arguments.
    """
