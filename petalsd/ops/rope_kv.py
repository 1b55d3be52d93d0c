"""Between the projection of q, k and v and attention, in one launch: head norms, rotation, KV write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from petalsd.kernels.rope_kv import rope_kv_kernel
from petalsd.ops.launching import Options, check_tensor, launch, next_power_of_2, strides
from petalsd.ops.ragged import PagedKV

_HEADS_BLOCK = 4
_VALUES_PER_WARP = 512


class WritePlaces(Protocol):
    """Where T tokens are written, on the device: a batch has them.

    positions      ``[T]`` int32; absolute position of each token
    write_origins  ``[T]`` int32; origin of the run that a token is written to (``ops.ragged``)
    write_offsets  ``[T]`` int32; its place within the page; -1 for padding: nothing is read or written for it
    """

    @property
    def positions(self) -> torch.Tensor: ...
    @property
    def write_origins(self) -> torch.Tensor: ...
    @property
    def write_offsets(self) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary embedding of the first R values of each head, R even; Su et al., 2021.

    angles          ``[L, 2, R/2]`` float32: the cosines of a row's pairs, then their sines. A table of the model's
                    positions has one address for all steps, so captured graphs read it without a gather before
                    them; rows by token are for rotations that depend on how long a sequence is
    rows            ``[T]`` int32, the row of each token; None: its position
    is_interleaved  pairs are values 2i and 2i + 1, not i and i + R/2
    """

    angles: torch.Tensor
    rows: torch.Tensor | None = None
    is_interleaved: bool = False


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Norms over each head of q and k before the rotation; weights ``[D]``, the rest as in ``add_norm.Norm``."""

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    eps: float
    offset: float = 0.0


def rope_and_write(
    qkv: torch.Tensor,
    q_out: torch.Tensor,
    kv: PagedKV,
    batch: WritePlaces,
    block: int,
    rotation: Rotation | None,
    norms: HeadNorms | None = None,
) -> None:
    """Rotate q and k of T tokens, and put k and v into the pages of ``block``, in place in the slab.

    qkv       ``[T, (H + 2*Hkv) * D]``, the heads of q, k and v one behind the other
    q_out     ``[T, H, D]``; rows of padding stay as they are
    kv        the slab. Slabs beside k and v are their scales, ``[N, P, Hkv]`` float32: what is stored is then the
              nearest of -127..127 times the scale of its token and head
    rotation  None: positions are not embedded

    Computed in float32. ValueError for tensors that don't fit.
    """
    tokens, num_heads, head_dim = q_out.shape
    num_kv_heads = kv.k.shape[2]
    num_all_heads = num_heads + 2 * num_kv_heads
    check_tensor("qkv", qkv, (tokens, num_all_heads * head_dim))
    check_tensor("q_out", q_out, (None, None, None))
    for name, slab in (("k", kv.k), ("v", kv.v)):
        check_tensor(name, slab, (None, kv.page_tokens, num_kv_heads, head_dim))
    for name in ("positions", "write_origins", "write_offsets"):
        check_tensor(name, getattr(batch, name), (tokens,), torch.int32)
    scales = _scales_of(kv)
    rotary = _check_rotation(rotation, tokens, head_dim)
    if norms is not None:
        check_tensor("q_weight", norms.q_weight, (head_dim,))
        check_tensor("k_weight", norms.k_weight, (head_dim,))
    half_block = next_power_of_2(max(1, rotary // 2))
    rest_block = next_power_of_2(max(1, head_dim - rotary))
    launch(
        rope_kv_kernel,
        (tokens, -(-num_all_heads // _HEADS_BLOCK)),
        (
            qkv,
            None if rotation is None else rotation.angles,
            None if rotation is None else batch.positions if rotation.rows is None else rotation.rows,
            None if norms is None else norms.q_weight,
            None if norms is None else norms.k_weight,
            q_out, kv.k, kv.v, *scales, batch.write_origins, batch.write_offsets,
            *strides(qkv), *strides(q_out), *strides(kv.k), *strides(kv.v),
            kv.page_tokens * num_kv_heads, num_kv_heads, block, 0.0 if norms is None else norms.eps,
        ),
        {
            "NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim, "ROTARY": rotary,
            "INTERLEAVED": rotation is not None and rotation.is_interleaved,
            "OFFSET": 0.0 if norms is None else norms.offset,
            "HEADS_BLOCK": _HEADS_BLOCK, "HALF_BLOCK": half_block, "REST_BLOCK": rest_block,
        },
        Options(num_warps=max(1, _HEADS_BLOCK * next_power_of_2(head_dim) // _VALUES_PER_WARP), num_stages=1),
    )  # fmt: skip


def _scales_of(kv: PagedKV) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    _, _, *scales = kv.slabs
    if not scales:
        if not kv.k.is_floating_point():
            raise ValueError(f"k is {kv.k.dtype}, and the slab has no scales")
        return None, None
    for name, tensor in zip(("k_scales", "v_scales"), scales, strict=True):
        if tensor.shape != kv.k.shape[:-1] or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} {list(tensor.shape)} {tensor.dtype} must be contiguous {list(kv.k.shape[:-1])} float32"
            )
    return scales[0], scales[1]


def _check_rotation(rotation: Rotation | None, tokens: int, head_dim: int) -> int:
    """How many values of a head are rotated."""
    if rotation is None:
        return 0
    angles = rotation.angles
    rotary = 2 * angles.shape[-1]
    if angles.shape[1:] != (2, rotary // 2) or rotary > head_dim or not angles.is_contiguous():
        raise ValueError(f"angles {list(angles.shape)} must be contiguous [any, 2, at most {head_dim // 2}]")
    if angles.dtype != torch.float32:
        raise ValueError(f"angles are {angles.dtype}: they must be torch.float32")
    if rotation.rows is not None:
        check_tensor("rows", rotation.rows, (tokens,), torch.int32)
    return rotary


def reference_rope_and_write(
    qkv: torch.Tensor,
    kv: PagedKV,
    batch: WritePlaces,
    block: int,
    rotation: Rotation | None,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    """``rope_and_write`` in plain torch, by the slab's own write; returns q ``[T, H, D]`` in float32.

    The q of padding is there, and means nothing.
    """
    num_kv_heads, head_dim = kv.k.shape[2:]
    heads = qkv.float().view(len(qkv), -1, head_dim)
    q, k, v = torch.split(heads, [heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms is not None:
        q = _head_norm(q, norms.q_weight, norms, qkv.dtype)
        k = _head_norm(k, norms.k_weight, norms, qkv.dtype)
    if rotation is not None:
        angles = rotation.angles[(batch.positions if rotation.rows is None else rotation.rows).long()]
        q, k = (_rotate(x, angles, rotation.is_interleaved) for x in (q, k))
    written = batch.write_offsets >= 0
    slots = (batch.write_origins.long() + block) * kv.page_tokens + batch.write_offsets.long()
    kv.write(slots[written], k[written].to(qkv.dtype), v[written].to(qkv.dtype))
    return q


def _head_norm(x: torch.Tensor, weight: torch.Tensor, norms: HeadNorms, dtype: torch.dtype) -> torch.Tensor:
    normed = functional.rms_norm(x, x.shape[-1:], None, norms.eps)
    if norms.offset == 0:
        normed = normed.to(dtype).float()
    weighed = normed * (weight.float() + norms.offset)
    return weighed.to(dtype).float()


def _rotate(x: torch.Tensor, angles: torch.Tensor, is_interleaved: bool) -> torch.Tensor:
    rotary = 2 * angles.shape[-1]
    dim = -1 if is_interleaved else -2
    left, right = x[..., :rotary].reshape(*x.shape[:2], *((-1, 2) if is_interleaved else (2, -1))).unbind(dim)
    cos, sin = angles[:, None, 0], angles[:, None, 1]
    rotated = torch.stack((left * cos - right * sin, right * cos + left * sin), dim=dim).flatten(-2)
    return torch.cat((rotated, x[..., rotary:]), dim=-1)
