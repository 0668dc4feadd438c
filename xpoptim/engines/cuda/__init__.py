"""The CUDA engine: one launch for all CuPy arrays of a device and a pair of dtypes.

- ``plan``: the arrays as tables, and the launches over them
- ``turns``: the order of work on several streams
- ``nvrtc``: CUDA C++ becomes a cubin
- ``driver``: all that is asked of CuPy and of the GPU
"""
