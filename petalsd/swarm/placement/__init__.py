"""Where a server should stand: pure functions of a state of the swarm, with no clock, no chance and no network.

Servers that see the same state come to the same answer, which is how they take turns without talking.
``docs/placement.md`` explains the rule and what it is worth.
"""
