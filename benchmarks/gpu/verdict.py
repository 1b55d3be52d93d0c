"""Whether a run may be accepted: by itself, and beside the last accepted results of the same card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu.cards import ATTENTION_CONTEXT, ATTENTION_ROWS, ATTENTION_SHARE, Card, Shape
from benchmarks.gpu.case import ERROR, TIME
from benchmarks.gpu.roofline import Step, block_launches, limit_s
from benchmarks.report import OURS, Row, describe_setting

LAUNCHES = "launches of a block"
STEP = "block step"
SPAN_STEP = "span step"
MAX_LAUNCHES = 10
WRONG_VALUES = "wrong values"
# More than this much worse, with spreads that do not overlap, is no chance any more.
MAX_LOSS = 0.05
_EXACT_UNITS = ("launches",)


def failures(rows: Sequence[Row], card: Card, shapes: Mapping[str, Shape]) -> Iterator[str]:
    """What is wrong with a run by itself: values, launches, and times beyond the targets of ``docs/gpu.md``.

    card    with the peaks that were measured on it
    shapes  of the models in the rows' settings
    """
    for row in rows:
        what, median = f"{row.metric}, {row.setting_text}", row.spread.median
        if row.provider != OURS:
            continue
        if row.metric == ERROR and not median <= float(row.setting["tolerance"]):
            yield f"{WRONG_VALUES}: {what} is {median:.2g}"
        elif row.metric == LAUNCHES and median > MAX_LAUNCHES:
            yield f"too many launches: {what} are {median:.0f}, {MAX_LAUNCHES} are allowed"
        elif (limit := _limit_us(row, card, shapes)) is not None and median > limit:
            yield f"too slow: {what} takes {median:.0f} us, at most {limit:.0f} are allowed"


def regressions(
    accepted: Mapping[str, Any], current: Mapping[str, Any], *, is_whole: bool = True
) -> Iterator[str]:
    """What became worse since the document that was accepted, both as ``report.publish`` writes them.

    Other providers' figures are not ours to judge, and neither is what was not measured before. Where the current
    run is not a whole one, nothing is missing in it.
    """
    now = {row["key"]: row for row in current["rows"]}
    for old in accepted["rows"]:
        if old["provider"] != OURS or old["metric"] == ERROR:
            continue
        what = f"{old['metric']}, {describe_setting(old['setting'])}"
        new = now.get(old["key"])
        if new is None and not is_whole:
            continue
        if new is None:
            yield f"missing: {what} is not measured any more"
        elif _is_worse(old, new):
            yield f"worse: {what} was {old['median']:g} {old['unit']}, is {new['median']:g}"


def _is_worse(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    if old["unit"] in _EXACT_UNITS:
        return bool(new["median"] > old["median"])
    if old["is_lower_better"]:
        return bool(new["median"] > old["median"] * (1 + MAX_LOSS) and new["p20"] > old["p80"])
    return bool(new["median"] < old["median"] * (1 - MAX_LOSS) and new["p80"] < old["p20"])


def _limit_us(row: Row, card: Card, shapes: Mapping[str, Shape]) -> float | None:
    """The target of a block's step as it is replayed, and of decode attention at many rows and long contexts."""
    setting = row.setting
    if row.metric in (STEP, SPAN_STEP) and setting["mode"] == "replayed":
        shape = shapes[str(setting["model"])]
        step = Step(int(setting["rows"]), int(setting["context"]), str(setting["weights"]))
        of_a_block = limit_s(block_launches(shape, step, card), card, shape.bandwidth_share)
        return 1e6 * of_a_block * int(setting.get("blocks", 1))
    is_attention = row.metric == TIME and setting["kernel"] == "decode_attention"
    if is_attention and setting["rows"] in ATTENTION_ROWS and int(setting["context"]) >= ATTENTION_CONTEXT:
        return 1e6 * (row.nbytes or 0) / (ATTENTION_SHARE * card.gb_per_s * 1e9)
    return None
