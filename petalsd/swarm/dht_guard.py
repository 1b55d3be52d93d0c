"""Keeps one bad DHT value from breaking a whole lookup.

hivemind unpacks values in the middle of its search; bytes that are not msgpack would end the search without
an answer for anybody. As a record validator this guard sees each value just before, and puts ``None`` in the
place of what cannot be unpacked.
"""

from __future__ import annotations

from hivemind.dht.crypto import DHTRecord
from hivemind.dht.validation import RecordValidatorBase
from hivemind.utils.serializer import MSGPackSerializer

from petalsd.swarm.dht_storage import LIMITS

_NONE = MSGPackSerializer.dumps(None)


class DHTGuard(RecordValidatorBase):  # type: ignore[misc]  # hivemind ships no types
    """Accepts everything, as our storage has its own bounds; hands out only what can be unpacked."""

    def validate(self, record: DHTRecord) -> bool:
        """Refuse none: of a dictionary that another node answers, hivemind would drop all other values with it."""
        return True

    def strip_value(self, record: DHTRecord) -> bytes:
        """The value as the search will unpack it."""
        try:
            if len(record.value) > LIMITS.max_value_bytes:
                return bytes(_NONE)
            MSGPackSerializer.loads(record.value)
        except Exception:  # whatever an unpacker may raise about foreign bytes, or what is none
            return bytes(_NONE)
        return bytes(record.value)

    def merge_with(self, other: RecordValidatorBase) -> bool:
        return isinstance(other, DHTGuard)
