"""HOW: a rule, traced, becomes a program, a small typed graph. Nothing here knows arrays, optimizers or devices.

- ``ops``: the closed table of operations, one row each with its NumPy, LLVM and CUDA spelling
- ``language``: what a rule sees, its values and functions
- ``tracer``: runs a rule once, and records what it does
- ``program``: the graph
- ``scalars``: its scalar part, evaluated on the host
- ``sums``: the one tree by which squares are added up
"""
