"""The parts of the GPU check: ``benchmarks/gpu.py`` puts them together."""
