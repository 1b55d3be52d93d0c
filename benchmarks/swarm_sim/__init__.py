"""A swarm in simulation: what a rule of placement makes of servers that come, go and fail."""
