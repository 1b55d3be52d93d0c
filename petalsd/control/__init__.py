"""The control socket and the metrics listener."""
