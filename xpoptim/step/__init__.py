"""One step over a container, from the call to the kernels.

- ``stepper``: the steps of one optimizer, counted: the last one again, or one that is checked in full
- ``checks``: what must hold of the arrays before anything is written
- ``prepared``: a step whose arrays were checked, and whether it can be run again
- ``state``: what is saved, step count and slots: made, checked, copied
- ``report``: the table that ``explain`` gives
"""
