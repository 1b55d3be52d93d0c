"""All documents of the control socket by name, and their JSON schemas."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from petalsd.bootstrap_status import BootstrapStatus, SwarmPeers
from petalsd.status import (
    DrainRequest,
    Error,
    Peers,
    Plan,
    Progress,
    RebalanceRequest,
    Reloaded,
    Sessions,
    Status,
    Version,
)

DOCUMENTS: dict[str, type[BaseModel]] = {
    "status": Status,
    "sessions": Sessions,
    "peers": Peers,
    "bootstrap-status": BootstrapStatus,
    "bootstrap-peers": SwarmPeers,
    "version": Version,
    "plan": Plan,
    "progress": Progress,
    "reloaded": Reloaded,
    "error": Error,
    "drain-request": DrainRequest,
    "rebalance-request": RebalanceRequest,
}


def schema_of(name: str) -> dict[str, Any]:
    """The JSON schema of a document, as a program that reads it wants it."""
    schema = DOCUMENTS[name].model_json_schema(
        by_alias=True, mode="validation" if name.endswith("-request") else "serialization"
    )
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
