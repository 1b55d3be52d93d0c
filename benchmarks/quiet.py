"""Keeps libraries from talking into the benchmarks' progress, and from spending time on it."""

from __future__ import annotations

import logging

import structlog
from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """Warnings and worse only, and no progress bars; for this process."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    transformers_logging.disable_progress_bar()
