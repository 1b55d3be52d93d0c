"""The speed that is announced: a configured number, or one measured once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from petalsd.config_loading import load_config
from petalsd.daemon.announcement import RecordWriter
from petalsd.daemon.plan import make_plan
from petalsd.daemon.speed import Rates, Speed
from petalsd.engine.engine import Engine
from petalsd.engine.iteration_cost import AttentionShare, Work
from petalsd.engine.live_rates import WINDOW_S, LiveRates
from petalsd.engine.observer import BatchReport, NullObserver
from petalsd.engine.runners import RunnerFactory
from petalsd.engine.throughput import MEASURE_LIMITS
from petalsd.paths import InstancePaths
from petalsd.swarm.link import LinkMeter
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan
from tests.engine.rig import TinyModel, opened, serving
from tests.engine.test_observer import Notes
from tests.tiny_models import FAMILIES, LAYER_VARIANTS, make_tiny


def speed_of(
    model_dir: Path,
    tmp_path: Path,
    *overrides: str,
    link: LinkMeter | None = None,
    live: LiveRates | None = None,
    has_graphs: bool = False,
) -> Speed:
    paths = InstancePaths("t", tmp_path, tmp_path)
    overrides = (f"model.source={model_dir}", "engine.device=cpu", "engine.threads=1", *overrides)
    config = load_config(None, {}, overrides).config
    plan = replace(make_plan(config, paths), has_graphs=has_graphs)
    live = live or LiveRates(AttentionShare())
    runners = RunnerFactory(plan.device, 1, MEASURE_LIMITS, NullObserver())
    return Speed(plan, config, paths, runners, live, link or LinkMeter())


async def test_a_configured_throughput_stands_alone(model_dir: Path, tmp_path: Path) -> None:
    """The number is announced as it is for any span; the three rates stay unknown; nothing is measured."""
    speed = speed_of(model_dir, tmp_path, "swarm.throughput=7")
    await speed.find_out()
    assert speed.rates == Rates(throughput=7.0)
    assert speed.rates.announced(4, is_relayed=True) == 7.0
    assert not (tmp_path / "throughput.json").exists()


@pytest.mark.parametrize("variant", [*FAMILIES, "bloom", "mixtral"])
async def test_a_measurement_is_made_once(variant: str, tmp_path: Path) -> None:
    """One random block of the family is measured, and the next start takes the figures from the disk."""
    family, overrides = LAYER_VARIANTS.get(variant, (variant, {}))
    make_tiny(family, tmp_path / "model", **overrides)
    first = speed_of(tmp_path / "model", tmp_path, "swarm.network_mbps=1")
    await first.find_out()
    second = speed_of(tmp_path / "model", tmp_path, "swarm.network_mbps=1")
    await second.find_out()
    assert first.rates == second.rates
    assert first.rates.network_rps == 1e6 / (16 * 64)
    assert first.rates.inference_rps is not None
    assert first.rates.inference_rps > 0
    assert first.rates.announced(4, is_relayed=False) <= first.rates.network_rps


async def test_the_network_is_configured_or_measured_or_assumed(model_dir: Path, tmp_path: Path) -> None:
    """A configured link wins; else transfers show it, held while it differs by little; until then 100 Mbit/s."""
    link = LinkMeter()
    speed = speed_of(model_dir, tmp_path, link=link)
    assert speed.rates == Rates()
    await speed.find_out()

    def mbps() -> float:
        assert speed.rates.network_rps is not None
        return round(speed.rates.network_rps * 16 * 64 / 1e6, 3)

    assert (mbps(), speed.rates.network_source) == (100.0, "assumed")
    for rate_mbps, expected in ((40, 40.0), (44, 40.0), (64, 64.0)):
        for _ in range(64):
            link.flowed(rate_mbps * 125_000 * 10, 10.0, is_upload=True)
        assert (mbps(), speed.rates.network_source) == (expected, "measured")
    configured = speed_of(model_dir, tmp_path, "swarm.network_mbps=7", link=link)
    await configured.find_out()
    assert configured.rates.network_source == "configured"
    assert configured.rates.network_rps == 7e6 / (16 * 64)


async def test_each_form_of_the_weights_is_measured(model_dir: Path, tmp_path: Path) -> None:
    """Figures of unquantized weights say nothing of quantized ones."""
    for quantization in ("none", "int8", "int4"):
        await speed_of(model_dir, tmp_path, f"model.quantization={quantization}").find_out()
    keys = json.loads((tmp_path / "throughput.json").read_text())
    for key, weights in zip(keys, ("", " with int8 weights", " with int4 weights"), strict=True):
        assert f"{model_dir} bfloat16{weights}, sample blocks on cpu (" in key


async def test_figures_with_and_without_graphs_are_kept_apart(model_dir: Path, tmp_path: Path) -> None:
    """They differ most where blocks are small."""
    speeds = [speed_of(model_dir, tmp_path, has_graphs=has_graphs) for has_graphs in (False, True)]
    for speed in speeds:
        await speed.find_out()
    keys = json.loads((tmp_path / "throughput.json").read_text())
    assert ["in captured graphs" in key for key in keys] == [False, True]


async def test_the_served_blocks_are_measured_once_and_count_from_then_on(tmp_path: Path) -> None:
    """Through the engine that serves them, and its clients hear nothing of it; the next start begins with that."""
    model = TinyModel(tmp_path / "model")
    first = speed_of(tmp_path / "model", tmp_path, "model.dtype=float32")
    await first.find_out()
    sample = first.rates
    heard = Notes()
    async with serving(model, observer=heard) as engine:
        await first.find_out_of(engine)
        served = first.rates
        assert (sample.source, served.source) == ("sample", "served") and served != sample
        assert not heard.batches and not heard.passes and not heard.admissions
        second = speed_of(tmp_path / "model", tmp_path, "model.dtype=float32")
        await second.find_out()
        assert second.rates == served
        await second.find_out_of(engine)
        assert second.rates == served
        int8 = speed_of(tmp_path / "model", tmp_path, "model.dtype=float32", "engine.kv_dtype=int8")
        await int8.find_out()
        async with opened(engine):
            await int8.find_out_of(engine)
        assert int8.rates.source == "sample", "clients are not disturbed"
    assert len(json.loads((tmp_path / "throughput.json").read_text())) == 3


async def test_what_clients_show_is_announced_once_it_differs(model_dir: Path, tmp_path: Path) -> None:
    """Slower steps lower all rates; a change of less than 5 % is held back."""
    now = [0.0]
    live = LiveRates(AttentionShare(), lambda: now[0])
    speed = speed_of(model_dir, tmp_path, live=live)
    await speed.find_out()
    before = speed.rates
    assert before.inference_rps is not None and before.forward_rps is not None

    def window(slowdown: float) -> Rates:
        assert before.inference_rps is not None
        for _ in range(20):
            live.batch_done(BatchReport(slowdown / before.inference_rps, Work(1, 1), rows=1, decode_tokens=1))
        now[0] += WINDOW_S
        return speed.rates

    assert window(1.04).inference_rps == before.inference_rps
    for _ in range(10):
        slow = window(2.0)
    assert slow.source == "live" and slow.inference_rps is not None and slow.forward_rps is not None
    assert slow.inference_rps < 0.6 * before.inference_rps
    assert slow.forward_rps < 0.6 * before.forward_rps
    assert slow.announced(1, is_relayed=False) < before.announced(1, is_relayed=False)


async def test_the_record_before_anything_is_loaded(model_dir: Path, tmp_path: Path) -> None:
    """A JOINING record has the throughput that placement counts, and no cache yet."""
    speed = speed_of(model_dir, tmp_path, "swarm.throughput=7")
    await speed.find_out()
    overrides = [f"model.source={model_dir}", "engine.device=cpu", "model.quantization=int4"]
    plan = make_plan(load_config(None, {}, overrides).config, InstancePaths("t", tmp_path, tmp_path))
    writer = RecordWriter(plan, Engine(plan.limits, plan.device), speed, "somebody", lambda: 3)
    record = writer.describe(ServerState.JOINING, BlockSpan(1, 3), True)
    assert (record.state, record.throughput, record.span) == (ServerState.JOINING, 7.0, BlockSpan(1, 3))
    assert (record.cache_tokens_left, record.using_relay, record.public_name) == (None, True, "somebody")
    assert (record.torch_dtype, record.quant_type) == ("bfloat16", "int4")
    assert record.version is not None
    assert record.version.startswith("petalsd ")
