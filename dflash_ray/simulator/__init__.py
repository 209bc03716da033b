"""What a deployment would do: the production scheduler under a virtual clock, over times from a profile.

profile.py has the times of a machine, workload.py who asks for what, machine.py the virtual target and drafters,
simulation.py the clock, planning.py what comes of it for a number of groups, with energy and cost. measuring.py makes a
profile of this machine.
"""
