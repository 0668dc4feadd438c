"""Runs CUDA kernels on the host, to test them where there is no GPU; see host_kernel.py and shim.h."""
