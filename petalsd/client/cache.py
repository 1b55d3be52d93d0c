"""An inference session as transformers' ``past_key_values``, so that its generation loops drive it unchanged."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType

import torch
from transformers import Cache

from petalsd.client.ragged_session import RaggedSession
from petalsd.client.runtime import ClientRuntime
from petalsd.client.session import InferenceSession
from petalsd.errors import BadRequest, SessionClosed


class RemoteCache(Cache):  # type: ignore[misc]  # transformers ships no types here
    """The servers hold the keys and values; this is their length, their rollback and the order of their rows.

    The session opens with the first step. ``max_tokens`` may stay open until then: ``generate`` reserves what it
    needs. Use as a context manager, or ``close`` it: the servers hold memory for it until then, or until it is
    collected as garbage.
    """

    def __init__(
        self,
        runtime: ClientRuntime,
        make_session: Callable[[int], InferenceSession],
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(layers=[])
        self._runtime = runtime
        self._make_session = make_session
        self._max_tokens = max_tokens
        self._is_fixed = max_tokens is not None
        self._is_closed = False
        self._session: InferenceSession | RaggedSession | None = None
        self._hypo_ids: torch.Tensor | None = None
        self._user = threading.RLock()

    @property
    def position(self) -> int:
        """Tokens that each row has behind it. Assigning a smaller value rolls back to it."""
        return 0 if self._session is None else self._session.position

    @position.setter
    def position(self, value: int) -> None:
        if self._session is not None:
            self._session.position = value
        elif value != 0:
            raise BadRequest("position", value, "nothing was generated yet")

    @property
    def session(self) -> InferenceSession | RaggedSession | None:
        """The session below; None before the first step."""
        return self._session

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """For one generation: another thread's would continue this one's text. BadRequest when there is one."""
        if not self._user.acquire(blocking=False):
            raise BadRequest("past_key_values", "a session", "another thread is generating with it")
        try:
            yield
        finally:
            self._user.release()

    def reserve(self, max_tokens: int) -> None:
        """Make sure that ``max_tokens`` positions fit; BadRequest when not, for servers fix this at the start."""
        self._check_open()
        if not self._is_fixed and self._session is None:
            self._max_tokens = max_tokens
        elif self._max_tokens is not None and max_tokens > self._max_tokens:
            raise BadRequest(
                "max_length",
                max_tokens,
                f"the session was opened for {self._max_tokens} tokens and cannot grow",
            )

    def check_padding(self, padding: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """What the session's rows begin with, or will, when its first step is told so; BadRequest for a change."""
        if self._session is None:
            return padding
        held = self._session.padding if isinstance(self._session, RaggedSession) else None
        if padding is not None and padding != (held or (0,) * len(padding)):
            rule = f"rows of the session begin with {held or 'no'} tokens of padding, and stay so"
            raise BadRequest("attention_mask", padding, rule)
        return held

    def step(self, hidden: torch.Tensor, padding: tuple[int, ...] | None = None) -> torch.Tensor:
        """Run ``[B, n, M]`` through the remote blocks; same shape, dtype and device.

        ``padding`` is what the rows of the session begin with, if any do, which counts in the first step.
        """
        self._check_open()
        if self._session is None:
            max_tokens = self._max_tokens or hidden.shape[1]
            self._session = (
                self._make_session(max_tokens)
                if padding is None
                else RaggedSession(self._make_session, padding, max_tokens)
            )
            weakref.finalize(self, self._runtime.start_soon, self._session.close).atexit = False
        hypo_ids = None if self._hypo_ids is None else tuple(self._hypo_ids.tolist())
        output = self._runtime.run(self._session.step(hidden.cpu(), hypo_ids=hypo_ids))
        self._hypo_ids = None
        return output.to(hidden.device)

    def close(self) -> None:
        """End the session; idempotent. The end of the client was that of its sessions."""
        self._is_closed = True
        if self._session is not None:
            with contextlib.suppress(SessionClosed):
                self._runtime.run(self._session.close())

    def _check_open(self) -> None:
        if self._is_closed:
            raise SessionClosed("the session is closed: model.inference_session() makes another")

    def __enter__(self) -> RemoteCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What transformers' generation asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.position

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1 if self._max_tokens is None else self._max_tokens

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row j goes on from row ``beam_idx[j]``; told to the servers with the next step."""
        beam_idx = beam_idx.cpu()
        self._hypo_ids = beam_idx if self._hypo_ids is None else self._hypo_ids[beam_idx]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens, or all; transformers passes them negative."""
        if tokens_to_remove > 0:
            raise BadRequest("crop", tokens_to_remove, "a negative number, of tokens to remove, is needed")
        self.position = max(self.position + tokens_to_remove, 0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise BadRequest("batch_repeat_interleave", repeats, "the rows of a session stay as many as they are")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise BadRequest("batch_select_indices", tuple(indices.shape), "only reorder_cache moves rows")

    def reset(self) -> None:
        self.position = 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_initialized(self) -> bool:
        return self._session is not None
