"""One step over a container.

- ``step``: every check, then every write
- ``ready``: a step that can run again
- ``state``: step count and slots: made, checked, copied
- ``report``: the table that ``explain`` gives
"""
