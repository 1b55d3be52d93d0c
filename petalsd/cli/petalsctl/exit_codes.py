"""What the exit status of ``petalsctl`` means; scripts rely on it, so it never changes."""

from __future__ import annotations

EXIT_OK = 0  # done, or serving
EXIT_REFUSING = 1  # the daemon answers and does not serve: starting, loading, draining, drained, stopping
EXIT_NO_ANSWER = 2  # no daemon, no permission to talk to it, or no answer in time
EXIT_USAGE = 3
EXIT_FAILED = 4  # the daemon refused the operation, or it failed
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # the reader of our output went away
