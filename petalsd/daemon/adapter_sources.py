"""The adapters that a configuration names, read and checked before anything is served."""

from __future__ import annotations

from petalsd.config import ModelSection
from petalsd.errors import ConfigError
from petalsd.models.adapters import Adapter
from petalsd.models.architecture import Architecture
from petalsd.models.source import ModelSource


def open_adapters(
    section: ModelSection, model: ModelSource, architecture: Architecture
) -> tuple[Adapter, ...]:
    """Blocking: fetches what is missing. They lie where the model does, and are fetched with the same token.

    WeightsError for one that the model cannot be served with, ConfigError for two of one name.
    """
    adapters: dict[str, Adapter] = {}
    for place in section.adapters:
        adapter = Adapter.open(model.sibling(place), architecture)
        if adapter.name in adapters:
            raise ConfigError(
                f"model.adapters = {list(section.adapters)}: two are called {adapter.name}",
                hint="clients ask for adapters by name; rename one of the directories",
            )
        adapters[adapter.name] = adapter
    return tuple(adapters.values())
