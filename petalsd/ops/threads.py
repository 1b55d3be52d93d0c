"""How many threads compute on a CPU."""

from __future__ import annotations

import torch

from petalsd.control_groups import own_group, processor_quota


def fit_threads_to_quota() -> None:
    """No more threads, of torch and of our kernels, than our control groups grant processors.

    torch counts cores. Threads that wait for each other use up a smaller quota in a part of each period, and all
    of them stand still for the rest of it.
    """
    allowed = fitting_threads(torch.get_num_threads(), processor_quota(own_group()))
    if allowed < torch.get_num_threads():
        torch.set_num_threads(allowed)


def fitting_threads(num_threads: int, quota: float) -> int:
    """At most ``num_threads``, that many whole processors, and at least one."""
    return max(1, int(min(num_threads, quota)))
