"""``python -m petalsd`` is the ``petalsd`` command."""

from __future__ import annotations

import sys

from petalsd.cli.main import main

sys.exit(main())
