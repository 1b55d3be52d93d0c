"""Cards that steps are predicted for, by their makers' data sheets, and models whose blocks are served."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Card:
    """gb_per_s   of its memory, 10^9 bytes
    tflops     of dense bfloat16 products with float32 sums, 10^12 per second
    num_sms    multiprocessors
    """

    name: str
    gb_per_s: float
    tflops: float
    num_sms: int


CARDS = (
    Card("L4", 300, 121, 58),
    Card("RTX 3090", 936, 71, 82),
    Card("RTX 4090", 1008, 165, 128),
    Card("A100 80GB", 2039, 312, 108),
    Card("H100 SXM", 3352, 989, 132),
    Card("H200 SXM", 4800, 989, 132),
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A block of a model with gated MLP and grouped queries.

    bandwidth_share  of the card's memory bandwidth that a step through such blocks has to reach
    """

    name: str
    num_blocks: int
    hidden: int
    inner: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bandwidth_share: float

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def kv_token_bytes(self) -> int:
        """Keys and values of a token, in bfloat16."""
        return 2 * self.kv_width * 2

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of the products, fused as they are computed."""
        q = self.num_heads * self.head_dim
        return {
            "qkv": (q + 2 * self.kv_width, self.hidden),
            "output": (self.hidden, q),
            "gate_up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }


# Small blocks spend a larger part of a step between kernels, so less of the bandwidth can be asked of them.
SHAPES = (
    Shape("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, bandwidth_share=0.6),
    Shape("Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128, bandwidth_share=0.7),
)
# Decode attention alone, of 16 to 64 rows at contexts from 4096 tokens.
ATTENTION_SHARE = 0.8
ATTENTION_ROWS = (16, 64)
ATTENTION_CONTEXT = 4096
