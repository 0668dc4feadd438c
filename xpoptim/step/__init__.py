"""One step over a container, from the call to the kernels.

- ``stepper``: the steps of one optimizer, and what it keeps between them
- ``checks``: what must hold before anything is written
- ``prepared``: a step whose arrays were checked, to be run once and again
- ``state``: step count and slots: made, checked, copied
- ``report``: the table that ``explain`` gives
"""
