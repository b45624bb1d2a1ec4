"""When a recoverable source must speak although nothing happened, and when it must be silent."""

from __future__ import annotations

from typing import Literal

KICK_AFTER_S = 0.5
"""From the last answered gap to the kick that closes what a router may have missed meanwhile."""

KICK_EVERY_S = 2.0
"""At most one kick in this time: each makes every router ask for a dump."""

HOLD_AT_MOST_S = 1.0
"""So long, and never twice in a row, is news held back for routers that are recovering.

A kick, for which KICK_EVERY_S is the least distance, has a hold of its own.
"""

_ASK_S = 0.05  # after a kick, until routers ask
_SETTLE_S = 0.02  # a router takes an answer in after it has closed the connection
_SETTLE_PER_BLOCK_S = 2e-6


class Pulse:
    """The rules of beats, kicks and holds, on a clock that is handed in.

    A router can't notice that the last message was lost: an idle source beats. While a router
    recovers it neither asks for what it misses nor keeps more than about a thousand events: so
    nothing is sent meanwhile, as far as HOLD_AT_MOST_S reaches, and a kick follows. What goes
    missing while routers recover after a kick, no further kick would show: the hold covers it all.
    """

    def __init__(self, heartbeat_s: float) -> None:
        self._heartbeat_s = heartbeat_s
        self._beat_due_s = 0.0
        self._kick_due_s: float | None = None
        self._kicked_s = float("-inf")
        self._num_recovering = 0
        self._is_exposed = False  # who recovers may miss a hole among the news of now
        self._held_since_s = float("-inf")
        self._hold_until_s = float("-inf")

    def sent(self, now_s: float) -> None:
        """Something was sent: the next beat is due later."""
        self._beat_due_s = now_s + self._heartbeat_s

    def urge(self, now_s: float) -> None:
        """Routers have missed something: beat at once."""
        self._beat_due_s = now_s

    def filled(self, now_s: float) -> None:
        """A router was told real events that it had missed."""
        self._kick_due_s = max(now_s + KICK_AFTER_S, self._kicked_s + KICK_EVERY_S)

    def want_kick(self, now_s: float) -> None:
        """Make every router ask for everything, as soon as that may be."""
        self._kick_due_s = max(now_s, self._kicked_s + KICK_EVERY_S)

    def kicked(self, now_s: float) -> None:
        """A kick is on its way: nothing may come after it before routers have recovered."""
        self._kicked_s = self._held_since_s = now_s
        self._hold_until_s = max(self._hold_until_s, now_s + _ASK_S)

    def begin_recovery(self, now_s: float) -> None:
        """A router is about to be answered."""
        if not self._num_recovering and now_s >= self._held_since_s + 2 * HOLD_AT_MOST_S:
            self._held_since_s = now_s
        self._is_exposed |= now_s >= self._held_since_s + HOLD_AT_MOST_S
        self._num_recovering += 1

    def end_recovery(self, now_s: float, num_blocks: int) -> None:
        """It has its answer, and needs a moment to take ``num_blocks`` blocks in."""
        self._num_recovering -= 1
        settled_s = now_s + _SETTLE_S + num_blocks * _SETTLE_PER_BLOCK_S
        self._hold_until_s = max(self._hold_until_s, settled_s)
        outran = settled_s > self._held_since_s + HOLD_AT_MOST_S
        if self._is_exposed or (outran and self._held_since_s != self._kicked_s):
            self.filled(now_s)
        self._is_exposed &= self._num_recovering > 0

    def held_until(self, now_s: float) -> float | None:
        """Until when nothing may be sent; None: it may."""
        limit_s = self._held_since_s + HOLD_AT_MOST_S
        until_s = limit_s if self._num_recovering else min(limit_s, self._hold_until_s)
        return until_s if until_s > now_s else None

    def due(self, now_s: float) -> Literal["kick", "beat"] | None:
        """What to send now that there are no news. A kick is taken as sent."""
        if self._kick_due_s is not None and now_s >= self._kick_due_s:
            self._kick_due_s = None
            self._kicked_s = now_s
            return "kick"
        return "beat" if now_s >= self._beat_due_s else None

    def next_due(self) -> float:
        """When ``due`` will be something."""
        kick_s = self._kick_due_s
        return self._beat_due_s if kick_s is None else min(kick_s, self._beat_due_s)
