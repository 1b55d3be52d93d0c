"""The life of the process: what is loaded, announced, watched, reloaded and drained, and in which order."""
