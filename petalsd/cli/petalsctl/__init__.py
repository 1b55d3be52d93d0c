"""The ``petalsctl`` command: asks a running petalsd over its control socket, and shows the answer to a person.

Everything here but ``generate`` and ``doctor`` gets by with the standard library, so that an answer takes a blink.
"""
