"""What `make demo` runs: a real model from a Python package, and a private swarm of two daemons on loopback."""
