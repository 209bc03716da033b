"""How much is speculated in a step: costs, acceptance, the choice, and the account that keeps it from ever losing.

Pure policy over arrays by slot: no I/O and no clocks. controller.py is what the scheduler talks to.
"""
