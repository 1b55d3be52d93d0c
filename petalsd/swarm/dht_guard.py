"""Keeps one bad DHT value from breaking a whole lookup.

hivemind unpacks values in the middle of its search; bytes that are not msgpack would end the search without
an answer for anybody. As a record validator this guard sees each value just before, and puts ``None`` in the
place of what cannot be unpacked.
"""

from __future__ import annotations

from hivemind.dht.crypto import DHTRecord
from hivemind.dht.validation import RecordValidatorBase
from hivemind.utils.serializer import MSGPackSerializer

MAX_VALUE_BYTES = 256 * 1024
_NONE = MSGPackSerializer.dumps(None)


class DHTGuard(RecordValidatorBase):  # type: ignore[misc]  # hivemind ships no types
    """Accepts everything it can hold; hands out only what can be unpacked."""

    def validate(self, record: DHTRecord) -> bool:
        """Whether to keep a record for others: refuse none but the absurdly large."""
        return len(record.value) <= MAX_VALUE_BYTES

    def strip_value(self, record: DHTRecord) -> bytes:
        """The value as the search will unpack it."""
        try:
            MSGPackSerializer.loads(record.value)
        except Exception:  # whatever an unpacker may raise about foreign bytes
            return bytes(_NONE)
        return bytes(record.value)

    def merge_with(self, other: RecordValidatorBase) -> bool:
        return isinstance(other, DHTGuard)
