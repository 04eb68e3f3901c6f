"""Grids of configurations and seeds: what each part brings, and which to choose.

grid.py       the YAML file of rows, and the cells that they make
runner.py     ``ablate``: trains and evaluates the cells
table.py      their table, with bootstrap intervals
selection.py  ``select``: the best row on validation
"""
