"""When a process that died is started again, and when it is given up."""

from __future__ import annotations

from collections import deque

MAX_RESTARTS = 5
WINDOW_S = 600.0
_FIRST_DELAY_S = 1.0


class Restarts:
    """At most ``max_restarts`` within ``window_s``, each after twice the delay of the last."""

    def __init__(
        self,
        max_restarts: int = MAX_RESTARTS,
        window_s: float = WINDOW_S,
        first_delay_s: float = _FIRST_DELAY_S,
    ) -> None:
        self._max_restarts = max_restarts
        self._window_s = window_s
        self._first_delay_s = first_delay_s
        self._times_s: deque[float] = deque()

    def delay_s(self, now_s: float) -> float | None:
        """How long to wait before the restart that is counted by this call; None: no more."""
        while self._times_s and now_s - self._times_s[0] > self._window_s:
            self._times_s.popleft()
        if len(self._times_s) >= self._max_restarts:
            return None
        self._times_s.append(now_s)
        return float(self._first_delay_s * 2 ** (len(self._times_s) - 1))
