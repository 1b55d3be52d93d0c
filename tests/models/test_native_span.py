"""Decode steps in C++ give what the block itself gives, in every shape, dtype and tier, and in any company."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from petalsd import _C
from petalsd.errors import KVPoolError
from petalsd.models.block import BlockWeights, TransformerBlock
from petalsd.models.block_config import BlockConfig
from petalsd.models.native_span import NativeSpan, can_be_native
from petalsd.models.paged_span import BlockByBlock, CosSin, PagedSpan
from petalsd.models.rope import Rope
from petalsd.models.spans import paged_span
from petalsd.ops.packed_weight import PackedWeight, WeightFormat
from petalsd.ops.ragged import PagedKV, RaggedBatch
from petalsd.ops.weight_packing import pack_weight
from petalsd.types import BlockSpan
from tests.numeric import assert_close
from tests.paged_rows import PagedRows

CPU = torch.device("cpu")
INDEX = 2
HERE = BlockSpan(INDEX, INDEX + 1)
BLOCKS = 4  # pages of a run


FORMATS = {torch.float32: WeightFormat.FLOAT32, torch.bfloat16: WeightFormat.BFLOAT16}


def has_tier(tier: str) -> bool:
    try:
        make_native(make_block(), tier=tier)
    except KVPoolError:
        return False
    return True


def make_block(
    dtype: torch.dtype = torch.float32,
    biases: bool = False,
    format: WeightFormat | None = None,
    **overrides: Any,
) -> TransformerBlock:
    """A random block of an odd shape: no size but the head's is a multiple of 8.

    Packed in ``format``, by default in the dtype's.
    """
    raw = {
        "model_type": "qwen3", "hidden_size": 84, "intermediate_size": 150, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": BLOCKS, "vocab_size": 16,
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 4096, "tie_word_embeddings": True,
        "rope_theta": 10000.0,
    } | overrides  # fmt: skip
    config = BlockConfig.from_hf(raw)
    generator = torch.Generator().manual_seed(7)

    def weight(*shape: int, scale: float = 0.15) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    m, d, i = config.hidden_size, config.head_dim, config.intermediate_size
    q, kv = config.num_heads * d, config.num_kv_heads * d

    def matrix(num_out: int, num_in: int) -> PackedWeight:
        return pack_weight(weight(num_out, num_in), format or FORMATS.get(dtype, WeightFormat.FLOAT32))

    weights = BlockWeights(
        input_norm=1 + weight(m),
        qkv=matrix(q + 2 * kv, m),
        output=matrix(m, q),
        mlp_norm=1 + weight(m),
        gate_up=matrix(2 * i, m),
        down=matrix(m, i),
        q_norm=1 + weight(d),
        k_norm=1 + weight(d),
    )
    if biases:
        weights = replace(
            weights, qkv_bias=weight(q + 2 * kv), output_bias=weight(m), gate_up_bias=weight(2 * i),
            down_bias=weight(m), q_norm=None, k_norm=None,
        )  # fmt: skip
    return TransformerBlock(INDEX, config, weights, Rope(config, dtype, CPU))


def in_float32(block: TransformerBlock) -> TransformerBlock:
    """The block with the same weights, computed in float32."""

    def exact(weight: Any) -> Any:
        if isinstance(weight, PackedWeight):
            return pack_weight(weight.unpack(torch.float32), WeightFormat.FLOAT32)
        return None if weight is None else weight.float()

    weights = {name: exact(getattr(block.weights, name)) for name in BlockWeights.__dataclass_fields__}
    rope = Rope(block.config, torch.float32, CPU)
    return TransformerBlock(INDEX, block.config, BlockWeights(**weights), rope)


def make_native(block: TransformerBlock, threads: int = 1, tier: str = "auto") -> NativeSpan:
    return NativeSpan({INDEX: block}, _C.ThreadTeam(threads), tier)


def by_torch(block: TransformerBlock) -> BlockByBlock:
    return BlockByBlock({INDEX: block})


class Stranger:
    """A block of which nothing is known but that it computes."""

    def forward_paged(
        self, hidden: torch.Tensor, kv: PagedKV, batch: RaggedBatch, cos_sin: CosSin
    ) -> torch.Tensor:
        return hidden + 1


class Run:
    """Rows with a history of their own length, and one new token each."""

    def __init__(
        self,
        block: TransformerBlock,
        lengths: list[int],
        page_tokens: int = 16,
        stored: torch.dtype | None = None,
    ) -> None:
        config = block.config
        self.rows = PagedRows(
            BLOCKS, config.num_kv_heads, config.head_dim, page_tokens, num_runs=64, dtype=block.dtype
        ).in_head_major(stored)
        self.ids = [self.rows.add_row() for _ in lengths]
        generator = torch.Generator().manual_seed(3)
        self.histories = [torch.randn(n, config.hidden_size, generator=generator) for n in lengths]
        self.new = torch.randn(len(lengths), config.hidden_size, generator=generator).to(block.dtype)
        self.block = block

    def prefill(self, by: PagedSpan) -> torch.Tensor:
        """The histories by ``by``, all in one batch; ``[T, M]``."""
        with torch.inference_mode():
            batch = self.rows.extend(
                {row: len(states) for row, states in zip(self.ids, self.histories, strict=True)}
            )
            states = torch.cat(self.histories).to(self.block.dtype)
            return by.forward_paged(
                HERE, states, self.rows.kv, batch, self.block.rope.cos_sin(batch.positions)
            )

    def decode(self, by: PagedSpan) -> torch.Tensor:
        """Prefill by the block itself, then the new tokens by ``by``; ``[R, M]``."""
        filled = {
            row: len(states) for row, states in zip(self.ids, self.histories, strict=True) if len(states)
        }
        with torch.inference_mode():
            if filled:
                batch = self.rows.extend(filled)
                states = torch.cat(self.histories).to(self.block.dtype)
                self.block.forward_paged(
                    states, self.rows.kv, batch, self.block.rope.cos_sin(batch.positions)
                )
            batch = self.rows.extend(dict.fromkeys(self.ids, 1))
            cos_sin = self.block.rope.cos_sin(batch.positions)
            return by.forward_paged(HERE, self.new, self.rows.kv, batch, cos_sin)


TIERS = ["amx-emulated", "baseline", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"]
LENGTHS = [0, 1, 7, 8, 15, 16, 63, 64, 65, 130]

SHAPES: dict[str, dict[str, Any]] = {
    "odd-sizes": {},
    "biases": {"biases": True},
    "no-groups": {"num_key_value_heads": 6},
    "one-kv-head": {"num_key_value_heads": 1},
    "head-64": {"head_dim": 64},
    "head-80": {"head_dim": 80},
    "head-128": {"head_dim": 128},
    "head-12": {"head_dim": 12},
    "window-1": {"use_sliding_window": True, "sliding_window": 1, "max_window_layers": 0},
    "window-9": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    "window-64": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0},
}


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    """Every tier that this processor has."""
    if not has_tier(request.param):
        pytest.skip(f"this processor has no {request.param}")
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_equals_the_block(shape: str, tier: str) -> None:
    """Rows of all lengths around page, tile and window borders, to 2e-5 of the states' scale."""
    block = make_block(**SHAPES[shape])
    expected = Run(block, LENGTHS).decode(by_torch(block))
    actual = Run(block, LENGTHS).decode(make_native(block, tier=tier))
    assert_close(actual, expected, 2e-5, 2e-5, shape)


@pytest.mark.parametrize("page_tokens", [16, 48, 64])
def test_page_sizes(page_tokens: int) -> None:
    """Tokens are found in pages of any size."""
    block = make_block()
    expected = Run(block, LENGTHS, page_tokens).decode(by_torch(block))
    assert_close(
        Run(block, LENGTHS, page_tokens).decode(make_native(block)),
        expected,
        2e-5,
        2e-5,
        f"{page_tokens} a page",
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_nearer_to_float32_than_torch_is(shape: str, tier: str) -> None:
    """With the same bfloat16 weights and inputs, the error against float32 arithmetic is not above torch's own."""
    block = make_block(torch.bfloat16, **SHAPES[shape])
    exact = in_float32(block)
    expected = Run(exact, LENGTHS)
    expected.new = expected.new.to(torch.bfloat16).float()
    expected.histories = [states.to(torch.bfloat16).float() for states in expected.histories]
    truth = expected.decode(by_torch(exact))
    torch_error = (Run(block, LENGTHS).decode(by_torch(block)).float() - truth).abs().mean()
    native = (Run(block, LENGTHS).decode(make_native(block, tier=tier)).float() - truth).abs().mean()
    assert native <= torch_error
    assert native < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, threads: int, tier: str) -> None:
    """Bit for bit: a row in a batch of ten is the row alone, on any number of threads."""
    block = make_block(dtype)
    together = Run(block, LENGTHS)
    batched = together.decode(make_native(block, threads, tier))
    alone = make_native(block, tier=tier)
    for i, length in enumerate(LENGTHS):
        single = Run(block, [length])
        single.histories, single.new = [together.histories[i]], together.new[i : i + 1]
        with torch.inference_mode():
            # The same cache: torch's prefill of other shapes rounds differently.
            single.rows.kv = together.rows.kv
            batch = together.rows.extend({together.ids[i]: 0})
            batch = replace(batch, token_bounds=[0, 1], positions=torch.tensor([length]))
            cos_sin = block.rope.cos_sin(batch.positions)
            out = alone.forward_paged(HERE, single.new, together.rows.kv, batch, cos_sin)
        assert torch.equal(out[0], batched[i]), f"row {i}"


def test_a_row_of_nan_stays_alone() -> None:
    """NaN in one row's input reaches no other row; what nobody wrote (NaN here) reaches none at all."""
    block = make_block()
    clean = Run(block, LENGTHS).decode(make_native(block))
    run = Run(block, LENGTHS)
    run.new[4] = torch.nan
    dirty = run.decode(make_native(block))
    assert dirty[4].isnan().all()
    others = [row for row in range(len(LENGTHS)) if row != 4]
    assert torch.equal(dirty[others], clean[others])


@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_equals_the_block(shape: str, tier: str) -> None:
    """Sequences of all lengths in one batch, to 2e-5 of the states' scale, and what they left in the pages too."""
    block = make_block(**SHAPES[shape])
    expected, actual = Run(block, LENGTHS), Run(block, LENGTHS)
    native = make_native(block, tier=tier)
    assert_close(actual.prefill(native), expected.prefill(by_torch(block)), 2e-5, 2e-5, shape)
    for run in (expected, actual):
        run.histories = [states[:0] for states in run.histories]
    assert_close(actual.decode(native), expected.decode(by_torch(block)), 2e-5, 2e-5, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_a_prefill_are_the_prefill(dtype: torch.dtype, tier: str) -> None:
    """Bit for bit: token by token, in chunks, or at once, on any number of threads."""
    block = make_block(dtype, **SHAPES["window-64"])
    states = torch.randn(150, 84, generator=torch.Generator().manual_seed(5)).to(dtype)
    outputs = []
    for sizes, threads in (([150], 1), ([150], 3), ([7, 70, 1, 72], 2), ([1] * 150, 1)):
        native, run = make_native(block, threads, tier), Run(block, [0])
        parts = []
        for part in states.split(sizes):
            batch = run.rows.extend({0: len(part)})
            cos_sin = block.rope.cos_sin(batch.positions)
            with torch.inference_mode():
                parts.append(native.forward_paged(HERE, part, run.rows.kv, batch, cos_sin))
        outputs.append(torch.cat(parts))
    for output in outputs[1:]:
        assert torch.equal(output, outputs[0])


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("shape", ["odd-sizes", "biases", "head-64", "window-9"])
def test_quantized_weights_are_those_that_were_packed(format: str, shape: str, tier: str) -> None:
    """Against float32 arithmetic on the unpacked weights: what is left is the rounding of activations."""
    block = make_block(format=WeightFormat(format), **SHAPES[shape])
    exact = in_float32(block)
    expected = Run(exact, LENGTHS).decode(by_torch(exact))
    actual = Run(exact, LENGTHS).decode(make_native(block, tier=tier))
    assert (actual - expected).norm() / expected.norm() < 0.02


def test_quantized_weights_give_the_same_in_every_tier() -> None:
    """Integer sums are exact, so tiers differ by the rounding of floating-point sums alone."""
    block = make_block(format=WeightFormat.INT8)
    outputs = [Run(block, LENGTHS).decode(make_native(block, tier=name)) for name in TIERS if has_tier(name)]
    for output in outputs[1:]:
        assert_close(output, outputs[0], 2e-3, 2e-3, "tier")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_in_int8(dtype: torch.dtype, tier: str) -> None:
    """Keys and values in 8 bits, written and read by either path, cost little."""
    block = make_block(dtype, head_dim=64)
    exact = Run(block, LENGTHS).decode(by_torch(block)).float()
    for by in (by_torch(block), make_native(block, tier=tier)):
        rough = Run(block, LENGTHS, stored=torch.int8)
        assert (rough.decode(by).float() - exact).norm() / exact.norm() < 0.02
        prefilled = Run(block, LENGTHS, stored=torch.int8)
        prefilled.prefill(by)
        prefilled.histories = [states[:0] for states in prefilled.histories]
        assert (prefilled.decode(by).float() - exact).norm() / exact.norm() < 0.02


def test_pages_in_another_order_are_left_to_the_block() -> None:
    """Where pages are not those of the kernels, the block's own path is taken."""
    block = make_block()
    rows = PagedRows(BLOCKS, 2, 16, 8)
    batch = rows.extend({rows.add_row(): 5})
    states = torch.randn(5, 84)
    with torch.inference_mode():
        cos_sin = block.rope.cos_sin(batch.positions)
        expected = block.forward_paged(states, rows.kv, batch, cos_sin)
        assert torch.equal(make_native(block).forward_paged(HERE, states, rows.kv, batch, cos_sin), expected)


def test_what_cannot_be_native_stays_as_it_is() -> None:
    """Another activation or dtype keeps the block's own path, and so does a stranger's block."""
    assert can_be_native(make_block())
    assert not can_be_native(make_block(hidden_act="gelu_pytorch_tanh"))
    assert not can_be_native(make_block(torch.float16))
    assert not can_be_native(Stranger())
    assert isinstance(paged_span({0: make_block(hidden_act="gelu")}, num_threads=1), BlockByBlock)


def test_an_unknown_tier_is_refused() -> None:
    """The message names the value and the choices."""
    with pytest.raises(
        KVPoolError,
        match="tier = sse9: one of auto, amx, avx512bf16, avx512vnni, avx512, avx2, baseline, amx-emulated",
    ):
        make_native(make_block(), tier="sse9")


def test_a_span_tells_its_tier(tier: str) -> None:
    """A forced tier is the one that runs; left alone, it is the last one that this processor has."""
    assert make_native(make_block(), tier=tier).tier == tier
    assert make_native(make_block()).tier == [name for name in TIERS if has_tier(name)][-1]


def test_a_team_has_a_size() -> None:
    """A team counts its caller and refuses nonsense."""
    assert [_C.ThreadTeam(n).num_threads for n in (1, 2, 5)] == [1, 2, 5]
    for size in (0, -1, 5000):
        with pytest.raises(KVPoolError, match="num_threads"):
            _C.ThreadTeam(size)


def test_two_layouts_in_turn() -> None:
    """Batches that alternate find their own pages: what was prepared for one is not used for the other."""
    block = make_block()
    native = make_native(block, threads=2)
    runs = [Run(block, LENGTHS[:4]), Run(block, LENGTHS[4:])]
    expected = [
        Run(block, LENGTHS[:4]).decode(by_torch(block)),
        Run(block, LENGTHS[4:]).decode(by_torch(block)),
    ]
    for run, wanted in zip(runs, expected, strict=True):
        assert_close(run.decode(native), wanted, 2e-5, 2e-5, "batch")
