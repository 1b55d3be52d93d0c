"""Padding of the rows of a batch, which no server sees."""

from __future__ import annotations

import torch

from petalsd.errors import BadRequest


def read_padding(
    mask: torch.Tensor | None, position: int, length: int, *, ends: bool
) -> tuple[int, ...] | None:
    """Tokens of padding that each row begins with, by an attention mask; None where it has nothing to say.

    mask      ``[B, length]`` of the new tokens, or ``[B, position + length]`` of all
    position  tokens before the new ones
    ends      whether rows may end with padding, too

    BadRequest for other shapes, rows of padding alone, and padding within a text.
    """
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[1] not in (length, position + length):
        rule = f"its shape is [rows, tokens], of a step of {length} tokens from position {position} on"
        raise BadRequest("attention_mask", tuple(mask.shape), rule)
    is_text = mask == 1
    if bool(is_text.all()):
        return None if position and mask.shape[1] == length else (0,) * len(mask)
    first, count = is_text.int().argmax(dim=1), is_text.sum(dim=1)
    columns = torch.arange(mask.shape[1], device=mask.device)
    within = (columns >= first[:, None]) & (columns < (first + count)[:, None])
    is_whole = (
        bool((count > 0).all()) and torch.equal(within, is_text) and bool(((mask == 0) | is_text).all())
    )
    if not is_whole or not (ends or bool(is_text[:, -1].all())):
        where = "before or after" if ends else "before"
        raise BadRequest(
            "attention_mask", tuple(mask.shape), f"each row is one text, with padding only {where} it"
        )
    return tuple(first.tolist())


def check_positions(
    ids: torch.Tensor | None, position: int, length: int, padding: tuple[int, ...] | None
) -> None:
    """Positions may be given, if they say what is so. BadRequest for others."""
    if ids is None:
        return
    counted = torch.arange(position, position + length, device=ids.device)
    expected = (
        counted[None] if padding is None else counted - torch.tensor(padding, device=ids.device)[:, None]
    )
    if ids.shape[-1] != length or not bool(((ids == expected) | (expected < 0)).all()):
        rule = f"rows have no positions of their own: they count up from {position}, less what is padding"
        raise BadRequest("position_ids", tuple(ids.shape), rule)


def moved_left(states: torch.Tensor, padding: tuple[int, ...]) -> torch.Tensor:
    """``[B, n, M]`` with each row's padding behind its text, where nothing in the text sees it; differentiable."""
    return _rolled(states, torch.tensor(padding, device=states.device))


def moved_back(states: torch.Tensor, padding: tuple[int, ...]) -> torch.Tensor:
    """The reverse of ``moved_left``."""
    return _rolled(states, -torch.tensor(padding, device=states.device))


def _rolled(states: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    length = states.shape[1]
    places = (torch.arange(length, device=states.device) + shifts[:, None]) % length
    return states.gather(1, places[..., None].expand_as(states))
