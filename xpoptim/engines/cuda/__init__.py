"""The CUDA engine: one launch for all CuPy arrays of a device and a pair of dtypes.

- ``engine``: which arrays it can work on, and what it makes of the others
- ``plan``: the arrays as tables, and the passes over them
- ``watch``: looks whether the arrays are what they were, and refreshes the pointers of the gradients
- ``blocks``: a block program over one array, for Dropout
- ``keeper``: what an optimizer keeps on GPUs: the count of the steps, captured steps
- ``turns``: the order of the work on several streams
- ``nvrtc``: CUDA C++ becomes a cubin
- ``driver``: all that is asked of CuPy and of the GPU, launches too
"""
