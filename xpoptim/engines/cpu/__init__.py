"""The CPU engine: machine code over tables of NumPy arrays.

- ``engine``: which arrays it can work on, and what it makes of the others
- ``plan``: the arrays of a container as one table, and the kernels over it
- ``blocks``: a block program over one array, for Dropout
- ``watch``: looks whether hundreds of arrays are what they were, refreshes the pointers of the gradients, and goes on
  to the kernel
- ``thread_pool``: helper threads that share a kernel's work
- ``python_pool``: the same where there is no extension
- ``native``: the extension, whose source is ``native.c``
- ``threads``: how many threads there may be, and the lock around compilation
- ``jit``: assembly becomes machine code
"""
