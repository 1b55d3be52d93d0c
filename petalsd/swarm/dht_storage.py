"""What our node of the DHT keeps for others, within bounds: hivemind's own storage takes whatever peers send.

What is full refuses: nothing that is kept goes before its time, so that no peer can push out what others wrote.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import structlog
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.utils.timed_storage import TimedStorage, ValueWithExpiration, get_dht_time

from petalsd.swarm.protocol import MIB

log = structlog.get_logger(__name__)

_OVERHEAD_BYTES = 512  # what Python adds to one entry
_WIRE_BYTES = 24  # and msgpack
_ROUNDED_TO = 128  # so that a record that is written anew, a little longer, has room where all is full
_PURGE_PERIOD_S = 10.0
_REPORT_PERIOD_S = 600.0
_HEAP_SLACK = 64


@dataclass(frozen=True, slots=True)
class StorageLimits:
    """Far above what swarms need: each entry is kept by five nodes, so that one keeps few of a large swarm.

    max_keys          one for each block of each model
    max_entries       of one key: the servers of a block
    max_key_bytes     of one key: an answer about it must fit into one message of p2pd, 4 MiB
    max_subkey_chars  PeerIDs have about 50, names of models more
    max_total_bytes   of all keys, as they lie in memory: 400,000 entries of some hundred bytes
    max_lifetime_s    from now on; servers write for minutes
    """

    max_keys: int = 8 * 1024
    max_entries: int = 8 * 1024
    max_key_bytes: int = 3 * MIB
    max_subkey_chars: int = 256
    max_value_bytes: int = 64 * 1024
    max_total_bytes: int = 512 * MIB
    max_lifetime_s: float = 6 * 3600.0


LIMITS = StorageLimits()
CACHE_LIMITS = StorageLimits(max_total_bytes=128 * MIB)


class _Thrifty(TimedStorage):  # type: ignore[misc]  # hivemind ships no types
    """hivemind's notes each attempt to store, also one that it refuses, until what was stored would expire."""

    data: dict[Any, ValueWithExpiration[Any]]
    key_to_heap: dict[Any, Any]
    expiration_heap: list[Any]

    def store(self, key: Any, value: Any, expiration_time: float) -> bool:
        known = self.data.get(key)
        if known is not None and known.expiration_time >= expiration_time:
            return False
        is_stored = bool(super().store(key, value, expiration_time))
        if len(self.expiration_heap) > 2 * len(self.data) + _HEAP_SLACK:
            self.expiration_heap = list(self.key_to_heap.values())
            heapq.heapify(self.expiration_heap)
        return is_stored


class _Entries(_Thrifty, DictionaryDHTValue):  # type: ignore[misc]
    """The entries of one key, with ``num_bytes``, their size on the wire. Hivemind packs its own type only."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    @property
    def memory_bytes(self) -> int:
        return self.num_bytes + len(self.data) * _OVERHEAD_BYTES

    def would_take(self, subkey: str, expiration_time: float) -> bool:
        """Not so when what is there lives as long."""
        known = self.data.get(subkey)
        return known is None or known.expiration_time < expiration_time

    def growth(self, subkey: str, value: bytes) -> int:
        """By how much ``num_bytes`` would grow with it."""
        known = self.data.get(subkey)
        return _size(subkey, value) - (_size(subkey, known.value) if known is not None else 0)

    def store(self, key: str, value: bytes, expiration_time: float) -> bool:
        growth = self.growth(key, value)
        is_stored = super().store(key, value, expiration_time)
        if is_stored:
            self.num_bytes += growth
        return is_stored

    def purge(self) -> None:
        """Let go of what has expired."""
        self._remove_outdated()

    def copied(self) -> DictionaryDHTValue:
        """For hivemind's lookups, which add to what they are given."""
        self.purge()
        return self._twin(dict(self.data), dict(self.key_to_heap), list(self.expiration_heap))

    def shown(self) -> DictionaryDHTValue:
        """To be read at once."""
        self.purge()
        twin = self._twin(self.data, self.key_to_heap, self.expiration_heap)
        twin.frozen = True
        return twin

    def _twin(self, data: Any, key_to_heap: Any, heap: Any) -> DictionaryDHTValue:
        twin = DictionaryDHTValue()
        twin.data, twin.key_to_heap, twin.expiration_heap = data, key_to_heap, heap
        twin.latest_expiration_time = self.latest_expiration_time
        return twin

    def _remove_outdated(self) -> None:
        now, heap = get_dht_time(), self.expiration_heap
        while heap and heap[0].expiration_time < now:
            entry = heapq.heappop(heap)
            if self.key_to_heap.get(entry.key) == entry:
                self.num_bytes -= _size(entry.key, self.data[entry.key].value)
                del self.data[entry.key], self.key_to_heap[entry.key]


class BoundedStorage:
    """In the place of hivemind's ``DHTLocalStorage``: the methods that hivemind calls, and their meaning.

    But for this: whatever lives longer, entries (subkey -> value) take the place of a plain value under their key,
    and none takes theirs. One write would end the records of all servers of a block, or keep them out.
    """

    def __init__(self, limits: StorageLimits = LIMITS, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._keys = _Thrifty()
        self._num_bytes = 0  # at most: what expired is taken off when it is purged
        self._purged_s = self._reported_s = -_REPORT_PERIOD_S
        self._refused: Counter[str] = Counter()

    def store(self, key: DHTID, value: Any, expiration_time: float, subkey: str | None = None) -> bool:
        """Whether it is kept now; not so when there is no room or what is there lives longer."""
        if subkey is not None:
            return self.store_subkey(key, subkey, value, expiration_time)
        known = self._value(key)
        if isinstance(known, _Entries) or not self._is_sound(value, expiration_time):
            return False
        more = _memory_bytes(value) - _memory_bytes(known)
        if (more > 0 and not self._has_room(key, more)) or not self._keys.store(key, value, expiration_time):
            return False
        self._num_bytes += more
        return True

    def store_subkey(self, key: DHTID, subkey: Any, value: bytes, expiration_time: float) -> bool:
        """As ``store``."""
        if not self._is_sound(value, expiration_time) or not self._is_name(subkey):
            return False
        known = self._value(key)
        entries = known if isinstance(known, _Entries) else _Entries()
        if not entries.would_take(subkey, expiration_time) or not self._fits(entries, subkey, value):
            return False
        more = entries.growth(subkey, value)
        if subkey not in entries.data:
            more += _OVERHEAD_BYTES
        if more > 0 and not self._has_room(key, more):
            return False
        entries.store(subkey, value, expiration_time)
        self._put(key, entries, more)
        return True

    def get(self, key: DHTID) -> ValueWithExpiration[Any] | None:
        """The caller may change what it gets."""
        found = self._keys.get(key)
        if found is None or not isinstance(found.value, _Entries):
            return found
        return ValueWithExpiration(found.value.copied(), found.expiration_time)

    def items(self) -> Iterator[tuple[DHTID, ValueWithExpiration[Any]]]:
        """To be read at once, and not to be changed."""
        for key, (value, expiration_time) in self._keys.items():
            shown = value.shown() if isinstance(value, _Entries) else value
            yield key, ValueWithExpiration(shown, expiration_time)

    def num_bytes_of(self, key: DHTID) -> int:
        """What is kept of it takes so much on the wire, about."""
        value = self._value(key)
        return value.num_bytes if isinstance(value, _Entries) else len(value or b"")

    def __contains__(self, key: DHTID) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        """Keys."""
        return len(self._keys)

    def _value(self, key: DHTID) -> _Entries | bytes | None:
        found = self._keys.get(key)
        if found is None:
            return None
        if isinstance(found.value, _Entries):
            found.value.purge()
        value: _Entries | bytes = found.value
        return value

    def _put(self, key: DHTID, entries: _Entries, more_bytes: int) -> None:
        if self._value(key) is not entries:
            del self._keys[key]
        self._keys.store(key, entries, entries.latest_expiration_time)
        self._num_bytes += more_bytes

    def _is_sound(self, value: object, expiration_time: float) -> bool:
        now, limits = get_dht_time(), self._limits
        if not isinstance(value, bytes) or expiration_time < now:
            return False
        if not expiration_time <= now + limits.max_lifetime_s:  # or it is no number
            return self._refuse("lifetime")
        return len(value) <= limits.max_value_bytes or self._refuse("value_bytes")

    def _is_name(self, subkey: object) -> bool:
        """Text only: hivemind fails over entries of two types that expire at the same time."""
        is_name = isinstance(subkey, str) and len(subkey) <= self._limits.max_subkey_chars
        return is_name or self._refuse("subkey")

    def _fits(self, entries: _Entries, subkey: str, value: bytes) -> bool:
        limits, growth = self._limits, entries.growth(subkey, value)
        if subkey not in entries.data and len(entries.data) >= limits.max_entries:
            return self._refuse("entries")
        return growth <= 0 or entries.num_bytes + growth <= limits.max_key_bytes or self._refuse("key_bytes")

    def _has_room(self, key: DHTID, more_bytes: int) -> bool:
        if len(self) >= self._limits.max_keys and key not in self:
            return self._refuse("keys")
        if self._num_bytes + more_bytes > self._limits.max_total_bytes:
            self._purge()
        return self._num_bytes + more_bytes <= self._limits.max_total_bytes or self._refuse("total_bytes")

    def _purge(self) -> None:
        """Count anew, without what has expired; now and then, as it takes a while."""
        if self._clock() < self._purged_s + _PURGE_PERIOD_S:
            return
        self._purged_s = self._clock()
        self._num_bytes = 0
        for key in list(self._keys.data):
            self._num_bytes += _memory_bytes(self._value(key))

    def _refuse(self, limit: str) -> bool:
        """Return False, and say so in the log once in a while."""
        self._refused[limit] += 1
        if self._clock() >= self._reported_s + _REPORT_PERIOD_S:
            self._reported_s = self._clock()
            refused_by = dict(self._refused)
            log.warning(
                "dht_entries_refused", refused_by=refused_by, keys=len(self), num_bytes=self._num_bytes
            )
            self._refused.clear()
        return False


class LookupCache(BoundedStorage):
    """In the place of hivemind's cache: what our own lookups found, whole.

    hivemind lets peers write there as well, and prefers what lives longer to what is stored: one write would hide
    all records of a block from those who ask us.
    """

    def store(self, key: DHTID, value: Any, expiration_time: float, subkey: str | None = None) -> bool:
        """Replace what is known of ``key``; nothing but a dictionary."""
        if not isinstance(value, DictionaryDHTValue):
            return False
        entries = _Entries()
        for name, (packed, expires) in value.items():
            is_good = self._is_sound(packed, expires) and self._is_name(name)
            if is_good and self._fits(entries, name, packed):
                entries.store(name, packed, expires)
        more = entries.memory_bytes - _memory_bytes(self._value(key))
        if not entries.data or (more > 0 and not self._has_room(key, more)):
            return False
        self._put(key, entries, more)
        return True

    def store_subkey(self, key: DHTID, subkey: Any, value: bytes, expiration_time: float) -> bool:
        """Peers only would."""
        return False


def bound_storage(node: DHTNode) -> None:
    """Have ``node`` keep what it has been given so far, and what comes, within the limits."""
    protocol, storage = node.protocol, BoundedStorage()
    for key, (value, expiration_time) in protocol.storage.items():
        if isinstance(value, DictionaryDHTValue):
            for subkey, item in value.items():
                storage.store_subkey(key, subkey, item.value, item.expiration_time)
        else:
            storage.store(key, value, expiration_time)
    protocol.storage, protocol.cache = storage, LookupCache(CACHE_LIMITS)


def _memory_bytes(value: _Entries | bytes | None) -> int:
    if isinstance(value, _Entries):
        return value.memory_bytes
    return 0 if value is None else len(value) + _OVERHEAD_BYTES


def _size(subkey: str, value: bytes) -> int:
    num_bytes = len(subkey.encode()) + len(value) + _WIRE_BYTES
    return -(-num_bytes // _ROUNDED_TO) * _ROUNDED_TO
