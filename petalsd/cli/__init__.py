"""The ``petalsd`` command, one module per verb."""
