"""WHERE a recipe is carried out.

- ``choose``: which engine is in force
- ``reference``: operation by operation, on arrays of any library
- ``cpu``: kernels over NumPy arrays
- ``cuda``: kernels over CuPy arrays
- ``blocks``: kernels over one array, for Dropout
"""
