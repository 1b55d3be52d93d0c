"""The KV cache: device memory in pages, and which session holds which of them."""
