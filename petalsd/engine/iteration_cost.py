"""What an iteration will take: learnt from those that ran, a pure model over integers and floats.

An iteration reads weights, keys and values, and multiplies. Both are counted in units of the served model, so that
two numbers describe a device: seconds for reading one block, and seconds for one token in one block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from petalsd.models.block_config import BlockConfig
from petalsd.models.model_config import ModelConfig

_TOKENS_PER_READ = 32.0  # how many tokens cost as much as reading a block, until it was seen
_LEARNING_RATE = 0.3  # the part of a surprise that is believed
_MOST_SURPRISE = 0.5  # of what was expected
_LEAST = 0.5  # neither number falls to less than this part of itself at once, so both stay above zero


class Work(NamedTuple):
    """A part of an iteration.

    reads   blocks whose weights are read; keys and values that decode rows read count as so much of a block
    tokens  tokens times blocks; attention counts as the tokens that need as many operations
    """

    reads: float
    tokens: float


NO_WORK = Work(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class AttentionShare:
    """What attention costs beside the rest of a block.

    read  keys and values of one token, over the weights of the block, in elements
    pair  scores of one query with one key in all heads and their use, over a token's products with the weights
    """

    read: float = 0.0
    pair: float = 0.0

    @classmethod
    def of(cls, config: ModelConfig) -> AttentionShare:
        """Of any block of a model; nearly, where only the fused families say how wide their MLP is."""
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.hidden_size
        mlp = 3 * config.intermediate_size if isinstance(config, BlockConfig) else 8 * width
        projected = (2 * heads + 2 * kv_heads) * config.head_dim + mlp
        weights = width * projected
        return cls(2 * kv_heads * config.head_dim / weights, 2 * heads * config.head_dim / weights)

    def work(self, rows: int, tokens: int, context: int, blocks: int) -> Work:
        """Of ``tokens`` new tokens in each of ``rows`` behind ``context`` others; without reading the weights.

        Where there are more new tokens than one, what they read is little beside what they compute.
        """
        token_blocks = rows * blocks * tokens
        reads = self.read * context * token_blocks if tokens == 1 else 0.0
        return Work(reads, (1 + self.pair * (context + tokens / 2)) * token_blocks)

    def tokens_within(self, tokens: float, rows: int, context: int, blocks: int) -> int:
        """How many new tokens of each row make at most ``tokens`` of ``Work.tokens``; may be 0."""
        per_row = max(0.0, tokens) / (rows * blocks)
        first = 1 + self.pair * context
        if self.pair * per_row < 1e-6:
            return int(per_row / first)
        return int((math.sqrt(first * first + 2 * self.pair * per_row) - first) / self.pair)


class CostModel:
    """Seconds of ``Work``: ``read_s`` for each of its reads and ``token_s`` for each of its tokens.

    Learns by normalized least mean squares (Nagumo and Noda, 1967): a surprise changes both numbers in proportion
    to what each had to say in it, so that batches of one size for a long time do not spoil what was learnt from
    others. One measurement counts for little, and a wild one for no more than that. Before the first one the
    numbers are only right in relation to each other.
    """

    def __init__(self) -> None:
        self.read_s = 1.0
        self.token_s = 1.0 / _TOKENS_PER_READ
        self.is_known = False

    @classmethod
    def starting_from(cls, read_s: float, token_s: float) -> CostModel:
        """One that knows these numbers, both above zero, from elsewhere."""
        model = cls()
        model.read_s, model.token_s, model.is_known = read_s, token_s, True
        return model

    def seconds(self, work: Work) -> float:
        return self.read_s * work.reads + self.token_s * work.tokens

    def observe(self, work: Work, seconds: float) -> None:
        """``work``, which is not nothing, took ``seconds``."""
        expected = self.seconds(work)
        if not self.is_known:
            factor = seconds / expected
            self.read_s, self.token_s, self.is_known = self.read_s * factor, self.token_s * factor, True
            return
        most = _MOST_SURPRISE * expected
        surprise = _LEARNING_RATE * min(max(seconds - expected, -most), most)
        scaled = work.tokens / _TOKENS_PER_READ
        step = surprise / (work.reads**2 + scaled**2)
        self.read_s = max(self.read_s + step * work.reads, _LEAST * self.read_s)
        self.token_s = max(self.token_s + step * scaled / _TOKENS_PER_READ, _LEAST * self.token_s)
