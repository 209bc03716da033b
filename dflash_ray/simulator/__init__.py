"""What a deployment would do: the production scheduler under a virtual clock, over times from a profile.

profile.py has the times of a machine, deployment.py a group and its policy, workload.py who asks for what, machine.py
the virtual target and drafters, cores.py what shares a machine with them, simulation.py the clock, planning.py what
comes of it for a number of groups, with energy and cost. measuring.py makes a profile of this machine, serving.py adds
what a server on it takes beside the passes.
"""
