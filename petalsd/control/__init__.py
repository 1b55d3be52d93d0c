"""The control socket and the metrics listener; the only package that knows the HTTP library."""
