"""LLVM's assembly of a program.

- ``elementwise``: an update or a sum of squares over a table of arrays
- ``blocks``: a block program, which is Dropout's, over one array
"""
