"""Reading the codecs that stock peers may use for float tensors. We never write them.

Formats as in hivemind 1.1.12 (``compression/floating.py``, ``compression/quantization.py``). Each function
takes the bytes and the shape of a non-empty tensor and returns float32; ValueError says what does not fit, before
memory is taken. Beside the values themselves none takes more than the bytes again.
"""

from __future__ import annotations

import math
import struct

import numpy as np
import torch

_BLOCK = 4096  # values that share one scale in the block-wise codec
_MAX_CODES = 256
_AT_ONCE = 1 << 18  # values that are looked up together: NumPy makes 8-byte indices of them


def decode_float16(buffer: bytes, shape: tuple[int, ...]) -> torch.Tensor:
    """Values as float16."""
    _expect(buffer, 2 * math.prod(shape))
    return _floats(buffer, torch.float16).reshape(shape).float()


def decode_meanstd(buffer: bytes, shape: tuple[int, ...]) -> torch.Tensor:
    """float16 values scaled over the last axis, then the means, then the deviations as float32."""
    numel, rows = math.prod(shape), math.prod(shape[:-1])
    _expect(buffer, 2 * numel + 8 * rows)
    part = memoryview(buffer)
    values = _floats(part[: 2 * numel], torch.float16).reshape(rows, -1).float()
    means = _floats(part[2 * numel : 2 * numel + 4 * rows], torch.float32).reshape(rows, 1)
    deviations = _floats(part[2 * numel + 4 * rows :], torch.float32).reshape(rows, 1)
    return values.mul_(deviations).add_(means).reshape(shape)


def decode_codebook(buffer: bytes, shape: tuple[int, ...]) -> torch.Tensor:
    """int64 count, that many float32 codes, then one byte per value that picks a code."""
    numel = math.prod(shape)
    (num_codes,) = _counts(buffer, 1)
    _expect(buffer, 8 + 4 * num_codes + numel)
    codes = _floats(buffer[8 : 8 + 4 * num_codes], torch.float32)
    return _look_up(codes, memoryview(buffer)[8 + 4 * num_codes :]).reshape(shape)


def decode_blockwise(buffer: bytes, shape: tuple[int, ...]) -> torch.Tensor:
    """Two int64 counts, float32 scales (one per 4096 values), float32 codes, then one byte per value."""
    numel = math.prod(shape)
    num_scales, num_codes = _counts(buffer, 2, max_first=-(-numel // _BLOCK))
    codes_at = 16 + 4 * num_scales
    values_at = codes_at + 4 * num_codes
    _expect(buffer, values_at + numel)
    if num_scales != -(-numel // _BLOCK):
        raise ValueError(f"{num_scales} scales for {numel} values, one per {_BLOCK} is needed")
    scales = _floats(buffer[16:codes_at], torch.float32)
    values = _look_up(_floats(buffer[codes_at:values_at], torch.float32), memoryview(buffer)[values_at:])
    num_whole = numel // _BLOCK
    values[: num_whole * _BLOCK].view(num_whole, _BLOCK).mul_(scales[:num_whole, None])
    values[num_whole * _BLOCK :].mul_(scales[num_whole:])
    return values.reshape(shape)


def _counts(buffer: bytes, num: int, max_first: int = _MAX_CODES) -> tuple[int, ...]:
    if len(buffer) < 8 * num:
        raise ValueError("the header is cut off")
    counts = struct.unpack_from(f"<{num}q", buffer)
    limits = (max_first, _MAX_CODES) if num == 2 else (_MAX_CODES,)
    for count, limit in zip(counts, limits, strict=True):
        if not 1 <= count <= limit:
            raise ValueError(f"the header counts {count} entries, 1 to {limit} are possible")
    return counts


def _expect(buffer: bytes, num_bytes: int) -> None:
    if len(buffer) != num_bytes:
        raise ValueError(f"its size and codec need {num_bytes} bytes")


def _floats(data: bytes | memoryview, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)


def _look_up(codes: torch.Tensor, data: memoryview) -> torch.Tensor:
    picks = np.frombuffer(data, np.uint8)
    if (highest := int(picks.max())) >= len(codes):
        raise ValueError(f"a value picks code {highest} of {len(codes)}")
    values = np.empty(len(picks), np.float32)
    for start in range(0, len(picks), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        np.take(codes.numpy(), picks[some], out=values[some], mode="clip")
    return torch.from_numpy(values)
