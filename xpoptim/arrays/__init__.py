"""The user's arrays: containers of them, their libraries, their memory.

- ``types``: arrays and namespaces of any library, as types
- ``dtypes``: what a parameter may be stored in, and what it is computed in
- ``namespaces``: the libraries that arrays come from
- ``memory``: layouts and overlaps
- ``leaves``: nested containers as flat lists of leaves, and what a leaf may be
"""
