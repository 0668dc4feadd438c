"""WHERE a recipe is carried out.

- ``base``: what an engine is
- ``registry``: which engine has kernels for the arrays of which library
- ``choose``: auto, fused or reference: the user's choice
- ``sharing``: which engine serves which leaf
- ``reference``: operation by operation, on arrays of any library
- ``cpu``: kernels over NumPy arrays
- ``cuda``: kernels over CuPy arrays
- ``blocks``: kernels over one array, for Dropout
"""
