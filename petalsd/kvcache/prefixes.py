"""The prefix cache: beginnings of prompts that were computed before, found again by what went into the blocks.

A server sees hidden states, not tokens, so what is compared are their bytes. A prompt is taken apart into
*segments* of some tokens; the digest of one covers all before it, as in vLLM's automatic prefix caching, and who
and what it was computed for. What is found is what was computed then, keys and values as well as the states that
left the span: the next server of the chain gets the very bytes that it got before, and finds them again in turn.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

SEGMENT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Segment:
    """What was computed of ``SEGMENT_TOKENS`` tokens of all rows, on the CPU.

    keys, values  ``[blocks, B, SEGMENT_TOKENS, Hkv, D]`` in the model's dtype
    states        ``[B, SEGMENT_TOKENS, M]``, those that left the last block, likewise
    """

    keys: torch.Tensor
    values: torch.Tensor
    states: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.states.nbytes


def chain_start(scope: str) -> bytes:
    """What the digests of a prompt's first segments follow.

    ``scope``: all but the states that the result depends on, and who may share it.
    """
    return hashlib.sha256(scope.encode()).digest()


def chain_digests(link: bytes, hidden: torch.Tensor) -> list[bytes]:
    """One digest for each whole segment of ``hidden``, ``[B, n, M]`` on the CPU, in order.

    ``link``: the digest of the segment before it, or ``chain_start``. SHA-256: nobody finds a second prompt for a
    digest, so nobody is given what belongs to another one.
    """
    rows, tokens, size = hidden.shape
    shape, digests = f"{hidden.dtype} {rows} x {size}".encode(), []
    for start in range(0, tokens - SEGMENT_TOKENS + 1, SEGMENT_TOKENS):
        part = hidden[:, start : start + SEGMENT_TOKENS].contiguous()
        digest = hashlib.sha256(link + shape)
        digest.update(part.view(torch.uint8).view(-1).numpy().data)
        digests.append(link := digest.digest())
    return digests


class PrefixCache:
    """At most ``max_bytes`` of segments by their digests; the one used least recently goes first. 0: none.

    Belongs to one event loop. ``tokens_seen`` and ``tokens_reused`` count prompts that were looked up, over rows.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.tokens_seen = 0
        self.tokens_reused = 0
        self._segments: OrderedDict[bytes, Segment] = OrderedDict()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._segments

    def find(self, digests: Sequence[bytes]) -> list[Segment]:
        """The segments of the longest beginning that is known."""
        known: list[Segment] = []
        for digest in digests:
            segment = self._segments.get(digest)
            if segment is None:
                break
            known.append(segment)
        self.touch(digests[: len(known)])
        return known

    def touch(self, digests: Iterable[bytes]) -> None:
        """They were used now. The end of a prompt is given up before its beginning, without which it is no use."""
        for digest in reversed(list(digests)):
            if digest in self._segments:
                self._segments.move_to_end(digest)

    def put(self, digest: bytes, segment: Segment) -> bool:
        """Keep a segment, giving up others for it; False where one so large is never kept."""
        if segment.nbytes > self.max_bytes:
            return False
        if digest not in self._segments:
            self._segments[digest] = segment
            self.nbytes += segment.nbytes
        while self.nbytes > self.max_bytes:
            _, dropped = self._segments.popitem(last=False)
            self.nbytes -= dropped.nbytes
        return True

    def room_for(self, segment: Segment) -> int:
        """Tokens in each row of a prompt of such segments, whose end does not drive out its beginning."""
        return self.max_bytes // segment.nbytes * SEGMENT_TOKENS
