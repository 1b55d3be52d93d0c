"""Sessions, scheduling and batches: everything between a decoded request and the device."""
