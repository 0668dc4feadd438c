"""The user's arrays: containers of them, their libraries, their memory.

- ``dtypes``: what a parameter may be stored in, and what it is computed in
- ``namespaces``: which library an array is of, its namespace, its device
- ``cupy_namespace``: CuPy under the names of the Array API
- ``memory``: layouts, overlaps, copies
- ``leaves``: nested containers as flat lists of leaves, and what a leaf may be
"""
