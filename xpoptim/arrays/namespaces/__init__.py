"""The libraries that arrays come from. Nothing outside of this folder and the engines' folders asks which one it is.

- ``lookup``: an array's library, namespace, device and dtype
- ``libraries``: what differs between libraries, a small class each
- ``cupy_namespace``: CuPy under the names of the Array API
"""
