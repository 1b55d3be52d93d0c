"""The layers of the configuration, what is refused, and how the text of an error helps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from petalsd.config import Config
from petalsd.config_addresses import check_maddr, check_peer_id
from petalsd.config_loading import changed_keys, known_keys, load_config, value_of, with_live_keys
from petalsd.errors import ConfigError
from petalsd.types import BlockSpan

PEER = "/ip4/10.0.0.7/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "instance.toml"
    file.write_text(text)
    return file


def refusal(file: Path | None = None, environ: dict[str, str] | None = None, *overrides: str) -> str:
    """The text of the ConfigError that loading raises."""
    with pytest.raises(ConfigError) as caught:
        load_config(file, environ or {}, overrides)
    return caught.value.message


def test_defaults_are_at_least_those_of_petals() -> None:
    """A configuration of a source alone has the periods and limits that reference clients count on."""
    config = load_config(None, {}, ["model.source=owner/model"]).config
    assert config.blocks.count == "auto"
    assert config.blocks.balance_quality == 0.75
    assert config.blocks.balance_period_s == 10
    assert config.swarm.update_period_s == 120
    assert config.swarm.initial_peers == ()
    assert (config.engine.request_timeout_s, config.engine.step_timeout_s) == (180, 300)
    assert config.engine.session_timeout_s == 1800
    assert config.engine.kv_tokens == config.engine.max_session_tokens == "auto"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("auto", "auto"), ("0", 0), ("20GB", 20 * 10**9), ("3 GiB", 3 << 30), ("1024", 1024)],
)
def test_room_for_idle_sessions_is_a_size(tmp_path: Path, text: str, expected: int | str) -> None:
    """In words of the file as on the command line; 0 is allowed and means none."""
    config = load_config(None, {}, ["model.source=a/b", f"engine.kv_spill_bytes={text}"]).config
    assert config.engine.kv_spill_bytes == expected
    file = write(tmp_path, f'[model]\nsource = "a/b"\n[engine]\nkv_spill_bytes = "{text}"\n')
    assert load_config(file, {}, []).config.engine.kv_spill_bytes == expected


def test_command_line_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    """Each layer overrides the one below, key by key, and origins say which one won."""
    file = write(
        tmp_path, '[model]\nsource = "a/b"\nrevision = "file"\n[blocks]\ncount = 3\nbalance_period_s = 30\n'
    )
    environ = {"PETALSD_BLOCKS__COUNT": "4", "PETALSD_MODEL__REVISION": "environment", "HOME": "/root"}
    loaded = load_config(file, environ, ["blocks.count=5"])
    assert loaded.config.blocks.count == 5
    assert loaded.config.blocks.balance_period_s == 30
    assert loaded.config.model.revision == "environment"
    assert loaded.origins["blocks.count"] == "--set"
    assert loaded.origins["model.revision"] == "environment PETALSD_MODEL__REVISION"
    assert loaded.origins["blocks.balance_period_s"] == str(file)
    assert loaded.origins["blocks.join_delay_s"] == "default"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("model.source=123", "model.source", "123"),
        ("model.offline=true", "model.offline", True),
        ("model.max_disk_bytes=50GB", "model.max_disk_bytes", 50 * 10**9),
        ("model.max_disk_bytes=1.5GiB", "model.max_disk_bytes", 3 * 2**29),
        ("model.token_file=/run/token", "model.token_file", Path("/run/token")),
        ("blocks.count=auto", "blocks.count", "auto"),
        ("blocks.span=2:7", "blocks.span", BlockSpan(2, 7)),
        ("swarm.initial_peers=public", "swarm.initial_peers", "public"),
        (f"swarm.initial_peers={PEER}", "swarm.initial_peers", (PEER,)),
        (f'swarm.initial_peers=["{PEER}"]', "swarm.initial_peers", (PEER,)),
        ("swarm.initial_peers=[]", "swarm.initial_peers", ()),
        ("swarm.host_maddrs=/ip4/127.0.0.1/tcp/0, /ip6/::1/tcp/0", "swarm.host_maddrs",
         ("/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/0")),
        ("swarm.throughput=10", "swarm.throughput", 10.0),
        ("swarm.public_name=a=b", "swarm.public_name", "a=b"),
        ("engine.device=cuda:1", "engine.device", "cuda:1"),
        ("daemon.drain_deadline_s=0", "daemon.drain_deadline_s", 0.0),
    ],
)  # fmt: skip
def test_text_is_read_as_its_key_wants_it(override: str, key: str, value: object) -> None:
    """Text from the command line becomes the key's type: words, numbers, sizes, spans, lists."""
    overrides = [override] if key == "model.source" else ["model.source=a/b", override]
    found = value_of(load_config(None, {}, overrides).config, key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[blocks]\ncuont = 3", "unknown key blocks.cuont; did you mean blocks.count?"),
        ("[engine]\ncount = 3", "unknown key engine.count; did you mean blocks.count?"),
        ("count = 3", "count stands outside a section; did you mean blocks.count?"),
        ("[blokcs]", "unknown section [blokcs]; did you mean [blocks]?"),
        ('[engine]\nkv_tokens = "many"', "engine.kv_tokens = 'many': should be 'auto' or should be a valid int"),
        ("[engine]\nkv_tokens = 0", "engine.kv_tokens = 0"),
        ('[engine]\nkv_spill_bytes = "some"', "engine.kv_spill_bytes = 'some': should be 'auto'"),
        ("[engine]\nkv_spill_bytes = -1", "engine.kv_spill_bytes = -1"),
        ("[engine]\nmax_peer_share = 0.0", "engine.max_peer_share = 0.0"),
        ("[swarm]\nupdate_period_s = 7201", "swarm.update_period_s = 7201: should be less than or equal to 7200"),
        ("[swarm]\nupdate_period_s = 0.001", "update_period_s = 0.001: should be greater than or equal to 1"),
        ("[engine]\nthreads = 1025", "engine.threads = 1025: should be less than or equal to 1024"),
        ('[blocks]\ncount = "3"', "blocks.count = '3'"),
        ('[blocks]\nspan = "7:7"', "a span needs 0 <= start < end, got 7:7"),
        ('[blocks]\nspan = "0:4"\ncount = 4', "blocks.span and blocks.count exclude each other"),
        ("[blocks]\nbalance_period_s = nan", "blocks.balance_period_s = nan"),
        ("[engine]\nkv_tokens = 512\nmax_session_tokens = 1024", "raise kv_tokens or lower max_session_tokens"),
        ('[engine]\ndevice = "tpu"', "engine.device = 'tpu'"),
        ('[swarm]\ninitial_peers = ["/ip4/1.2.3.4/tcp/1"]', "an initial peer ends in /p2p/ and its PeerID"),
        ('[swarm]\ninitial_peers = "pubic"', "swarm.initial_peers = 'pubic'"),
        ('[swarm]\nhost_maddrs = ["/ip4/1.2.3/tcp/1"]', "'1.2.3' is no ip4 address"),
        ('[model]\nquantization = "nf4"', "model.quantization = 'nf4': write int4, which takes as much memory"),
        ("[swarm]\nhost_maddrs = []", "swarm.host_maddrs = []: a server listens somewhere"),
        ("[[blocks]]\ncount = 3", "blocks is a section: write [blocks]"),
        ("blocks = 3", "blocks is a section: write [blocks]"),
        ('[swarm]\nallowed_peers = ["x"]', "swarm.allowed_peers = ['x']: 'x' is no PeerID"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_the_reason(tmp_path: Path, text: str, expected: str) -> None:
    """An unknown, misspelt, wrong or not yet supported key names the file, the key and what to do."""
    file = write(tmp_path, text)
    message = refusal(file, None, "model.source=a/b")
    assert expected in message
    assert str(file) in message or "exclude" in expected or "raise" in expected


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("[blocks]\nspan = 3", 'blocks.span = 3: should be text as in "0:16"'),
        ('[model]\ncache_dir = ""', "model.cache_dir = '': should be a path"),
        (
            '[control]\nsocket = "/a\\u0000b"',
            "control.socket = '/a\\x00b': should be a path, which has no zero",
        ),
        (
            '[control]\ngroup = ""',
            "control.group = '': should not be empty; leave an optional key out instead",
        ),
        ('[model]\nadapters = "a/b"', "model.adapters = 'a/b': should be a list"),
        ('[model]\nmax_disk_bytes = "50 XB"', 'should be a number of bytes, or text as in "50GB"'),
        ("[metrics]\nlisten = 9464", 'metrics.listen = 9464: should be text as in "127.0.0.1:9464"'),
        ('[engine]\ndevice = "gpu"', "engine.device = 'gpu': should be auto, cpu, cuda or cuda:N"),
        (f'[swarm]\ninitial_peers = "{PEER}"', 'should be a list of multiaddrs, or the word "public"'),
        ('[swarm]\nhost_maddrs = "/ip4/0.0.0.0/tcp/0"', "should be a list"),
        ('[control]\nsocket = "~nobody-at-all/s"', "'~nobody-at-all/s': is in the home of nobody"),
        (f'[model]\nmax_disk_bytes = "{"9" * 400}"', 'should be a number of bytes, or text as in "50GB"'),
    ],
)
def test_a_wrong_type_is_told_in_words_of_the_file(tmp_path: Path, text: str, rule: str) -> None:
    """Not in names of our classes, of Python's types or of patterns."""
    message = refusal(write(tmp_path, text), None, "model.source=a/b")
    assert rule in message
    assert not any(word in message for word in ("instance of", "tuple", "pattern"))


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    """One run of check shows everything that is wrong, in file, environment and command line."""
    file = write(tmp_path, "[engine]\nthreads = -1\n")
    message = refusal(file, {"PETALSD_SWARM__UPDATE_PERIOD": "5"}, "model.dtype=int4", "nonsense")
    assert "model.source is required" in message
    assert "engine.threads = -1" in message
    assert "unknown key swarm.update_period; did you mean swarm.update_period_s?" in message
    assert "--set: model.dtype = 'int4'" in message
    assert "--set nonsense: write section.key=value" in message


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    """A missing file and broken TOML name the file, TOML also the line."""
    assert "No such file" in refusal(tmp_path / "none.toml")
    assert "line 1" in refusal(write(tmp_path, "[model\n"))
    assert "nested too deeply" in refusal(write(tmp_path, f"[model]\nadapters = {'[' * 10_000}"))
    assert "4300 digits" in refusal(write(tmp_path, f"[blocks]\ncount = {'9' * 5000}"))


@pytest.mark.parametrize("text", ["[" * 10_000, "9" * 5000])
def test_text_that_toml_cannot_read_is_taken_as_it_stands(text: str) -> None:
    assert "--set: blocks.count = " in refusal(None, None, "model.source=a/b", f"blocks.count={text}")


def test_text_that_is_not_utf8_is_refused() -> None:
    """Such a public name ended the daemon when it was first announced."""
    name = os.fsdecode(b"caf\xe9")
    assert "--set: swarm.public_name = 'caf\\udce9': is not UTF-8" in refusal(
        None, None, "model.source=a/b", f"swarm.public_name={name}"
    )
    message = refusal(None, {"PETALSD_MODEL__SOURCE": name})
    assert "environment PETALSD_MODEL__SOURCE: model.source = 'caf\\udce9': is not UTF-8" in message


def test_the_mark_that_some_editors_begin_a_file_with_is_no_error(tmp_path: Path) -> None:
    file = write(tmp_path, "\ufeff[model]\nsource = 'a/b'\n")
    assert load_config(file, {}, []).config.model.source == "a/b"


@pytest.mark.parametrize(
    "maddr", ["/ip4/0.0.0.0/tcp/0", "/ip6/::/udp/4001/quic", "/dns/a.example/tcp/1", PEER]
)
def test_well_formed_addresses_pass(maddr: str) -> None:
    """The forms that p2pd listens on or dials are accepted."""
    check_maddr(maddr, needs_peer=False)


@pytest.mark.parametrize(
    "maddr", ["127.0.0.1:80", "/tcp/80", "/ip4/1.2.3.4/tcp", "/ip4/1.2.3.4/tcp/x", "/ip4/1.2.3.4/udp/65536",
              "/ip4/1.2.3.4/smtp/25", "/dns/-x-/tcp/1", "/ip4/1.2.3.4/tcp/1/p2p/0", 7, "/ip4/1.2.3.4", PEER[:-1],
              f"{PEER}z", f"{PEER[:-30]}{PEER[-29:]}", "/ip4/1.2.3.4/p2p/" + PEER.rpartition("/")[2]]
)  # fmt: skip
def test_malformed_addresses_are_refused(maddr: object) -> None:
    """A multiaddr that p2pd could not use is found before anything is started."""
    with pytest.raises(ValueError, match=r"multiaddr|value|port|protocol|host name|PeerID"):
        check_maddr(maddr, needs_peer=False)


def test_an_address_of_addresses_has_no_port() -> None:
    check_maddr("/dnsaddr/a.example/p2p/" + PEER.rpartition("/")[2], needs_peer=True)


def test_both_kinds_of_peer_ids_pass_and_a_mistyped_one_does_not() -> None:
    """Nobody could use a server whose swarm.allowed_peers misses a character, and nothing else would say why."""
    for peer_id in (
        "QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY",
        "12D3KooWPPYTbCekn58DYPfnN3EpyNH2Y4LAnCUmRmTCwXsU74EX",
    ):
        check_peer_id(peer_id)
        for wrong in (peer_id[:-1], peer_id[1:], peer_id + "a", peer_id[:20] + peer_id[21:]):
            with pytest.raises(ValueError, match="is no PeerID"):
                check_peer_id(wrong)


def test_a_reload_applies_the_keys_that_are_live() -> None:
    """Changed keys fall into those that a reload applies and those that need a restart."""
    old = load_config(None, {}, ["model.source=a/b"]).config
    new = load_config(None, {}, ["model.source=c/d", "blocks.count=4", "daemon.log_level=debug"]).config
    assert changed_keys(old, new) == (["blocks.count", "daemon.log_level"], ["model.source"])
    merged = with_live_keys(old, new)
    assert (merged.model.source, merged.blocks.count, merged.daemon.log_level) == ("a/b", 4, "debug")
    assert changed_keys(old, old) == ([], [])


def test_every_key_is_documented() -> None:
    """Each key has a meaning and says whether a reload applies it."""
    assert set(Config.model_fields) == {key.partition(".")[0] for key in known_keys()}
    for key, field in known_keys().items():
        assert field.description, key
        assert isinstance(field.json_schema_extra, dict), key
        assert isinstance(field.json_schema_extra["live"], bool), key


def test_a_bootstrap_node_needs_no_model() -> None:
    """It listens on a port that stays the same unless another one is named."""
    config = load_config(None, {}, ["daemon.role=bootstrap"]).config
    assert config.swarm.host_maddrs == ("/ip4/0.0.0.0/tcp/31337", "/ip6/::/tcp/31337")
    assert (config.model.source, config.daemon.role) == ("", "bootstrap")
    own = ["daemon.role=bootstrap", "swarm.host_maddrs=/ip4/127.0.0.1/tcp/4001"]
    assert load_config(None, {}, own).config.swarm.host_maddrs == ("/ip4/127.0.0.1/tcp/4001",)


def test_a_bootstrap_node_refuses_what_it_would_not_obey() -> None:
    """Somebody who lists allowed_peers there means something by it."""
    with pytest.raises(ConfigError) as refused:
        load_config(None, {}, ["daemon.role=bootstrap", "model.source=a/b", "swarm.allowed_peers=[]"])
    assert 'daemon.role = "bootstrap" serves no blocks and does not obey' in refused.value.message
    assert "model.source, swarm.allowed_peers: take that out" in refused.value.message


def test_a_reload_cannot_make_a_server_something_else() -> None:
    """Not even in part: what else the file says is meant for the other kind of daemon."""
    server = load_config(None, {}, ["model.source=a/b", "blocks.count=4"]).config
    other = load_config(None, {}, ["daemon.role=bootstrap", "daemon.log_level=debug"]).config
    assert changed_keys(server, other) == ([], ["daemon.role"])
    assert with_live_keys(server, other) == server
