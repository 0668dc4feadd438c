"""WHAT one step computes: a rule with the options around it.

- ``declaration``: what a class of optimizers declares, its hyperparameters among it
- ``annotations``: the types that it declares them with
- ``hyperparameters``: what may be assigned to them, and what a schedule may give
- ``recipe``: the recipe, and what is traced of it
- ``options``: weight decay, clipping and the like, as functions before or after the rule, and their order
"""
