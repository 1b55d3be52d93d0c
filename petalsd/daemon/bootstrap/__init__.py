"""A daemon that serves no blocks: others join the swarm through it."""
