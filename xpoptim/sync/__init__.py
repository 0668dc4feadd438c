"""Several threads, signal handlers and forks.

- ``guard``: one caller at a time
- ``atomic``: a value that is changed by compare-and-swap
"""
