"""A program becomes text.

- ``llvm``: LLVM's assembly, for CPUs
- ``cuda``: CUDA C++, for NVIDIA's GPUs
"""
