"""Exceptions of xpoptim's own; everything else is a plain ``TypeError``, ``ValueError`` or the like."""


class TraceError(TypeError):
    """A rule does something that cannot be traced.

    The message names the rule and the argument or function. A rule may use the operators and the
    functions of its ``xp`` argument only; it may branch on fields annotated ``bool`` and on nothing
    else, and it may not write to its arguments.
    """
