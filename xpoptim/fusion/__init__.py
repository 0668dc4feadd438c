"""HOW: a rule is traced to a small typed program, and the program is written out as machine code.

``ops`` (the closed table) -> ``language`` (what a rule sees) -> ``trace`` -> ``program`` -> ``llvm``.
Nothing here knows arrays, optimizers or devices.
"""
