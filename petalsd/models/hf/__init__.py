"""Blocks that are decoder layers of transformers, filled from safetensors, with our paged attention inside."""
