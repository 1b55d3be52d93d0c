"""petalsd: serves transformer blocks of large language models to a Petals-compatible swarm."""

__version__ = "0.1.0"
