"""The schemas in the package are those of the documents, and the documents are what they say."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from petalsd.control.schema_files import DIRECTORY, schema_text
from petalsd.status_schemas import DOCUMENTS
from tests.cli.petalsctl.documents import BOOTSTRAP_STATUS, PEERS, PLAN, PROGRESS, SESSIONS, STATUS, SWARM

SAMPLES = {
    "status": STATUS, "sessions": SESSIONS, "peers": PEERS, "plan": PLAN, "progress": PROGRESS,
    "bootstrap-status": BOOTSTRAP_STATUS, "bootstrap-peers": SWARM,
}  # fmt: skip
# What a status document has at least, whatever else it learns (and in these units).
PROMISED = {
    "": (
        "version instance state since_s pid peer_id maddrs model span kv sessions throughput balance "
        "watchdog warnings"
    ),
    "model": "source dht_prefix num_blocks family dtype quantization",
    "span": "start end",
    "kv": "pages_total pages_free page_tokens tokens_left",
    "sessions": "active limit",
    "throughput": "tokens_per_s inference_rps forward_rps network_rps",
    "balance": "quality next_check_s last_move",
    "watchdog": "interval_s last_ping_s engine_last_step_s",
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_package_holds_the_schema(name: str) -> None:
    """`make docs` writes them."""
    assert (DIRECTORY / f"{name}.json").read_text() == schema_text(name)


def test_there_are_no_others() -> None:
    assert sorted(path.stem for path in DIRECTORY.iterdir()) == sorted(DOCUMENTS)


@pytest.mark.parametrize(("name", "document"), SAMPLES.items(), ids=SAMPLES.keys())
def test_what_petalsctl_is_tested_with_is_what_a_daemon_says(name: str, document: dict[str, Any]) -> None:
    """The command's tests and the daemon must mean the same documents, to the field."""
    model = DOCUMENTS[name].model_validate(document)
    assert json.loads(model.model_dump_json(by_alias=True)) == document
    jsonschema.validate(document, json.loads(schema_text(name)))


def test_the_promised_fields_are_there() -> None:
    for part, fields in PROMISED.items():
        section = STATUS[part] if part else STATUS
        assert set(fields.split()) <= set(section)


def test_a_missing_field_is_noticed() -> None:
    """The schema is not so loose that anything passes."""
    document = {key: value for key, value in STATUS.items() if key != "state"}
    with pytest.raises(jsonschema.ValidationError, match="'state' is a required property"):
        jsonschema.validate(document, json.loads(schema_text("status")))
