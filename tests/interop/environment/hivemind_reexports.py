"""Gives hivemind 1.1.12 back the top-level names that Petals 2.2 imports from it.

Installed into the environment of stock Petals beside a ``.pth`` file that imports it at start-up; it costs
nothing until something imports hivemind, and nothing of hivemind or Petals is changed on disk.
"""

import importlib
import sys
from importlib.machinery import PathFinder

HOMES = {
    "P2P": "hivemind.p2p",
    "P2PContext": "hivemind.p2p",
    "PeerID": "hivemind.p2p",
    "deserialize_tensor_stream": "hivemind.compression",
    "deserialize_torch_tensor": "hivemind.compression",
    "serialize_torch_tensor": "hivemind.compression",
    "anext": "hivemind.utils.asyncio",
    "get_logger": "hivemind.utils.logging",
    "nested_compare": "hivemind.utils.nested",
    "nested_flatten": "hivemind.utils.nested",
    "nested_pack": "hivemind.utils.nested",
    "MSGPackSerializer": "hivemind.utils.serializer",
    "BatchTensorDescriptor": "hivemind.utils.tensor_descr",
    "TensorDescriptor": "hivemind.utils.tensor_descr",
    "MAX_DHT_TIME_DISCREPANCY_SECONDS": "hivemind.utils.timed_storage",
    "TimedStorage": "hivemind.utils.timed_storage",
    "get_dht_time": "hivemind.utils.timed_storage",
}


def lookup(name):
    """Module ``__getattr__`` (PEP 562) of hivemind: resolves the names that moved to submodules."""
    if name not in HOMES:
        raise AttributeError(f"module 'hivemind' has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)


class HivemindFinder:
    """Finds hivemind as usual and hands ``lookup`` to the module before its own code runs."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname != "hivemind":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                module.__getattr__ = lookup
                execute(module)

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, HivemindFinder)
