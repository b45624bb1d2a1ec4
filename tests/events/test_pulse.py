"""When a source beats, kicks and holds back, on a clock of the test's own."""

from __future__ import annotations

from flexkv.events.pulse import HOLD_AT_MOST_S, KICK_AFTER_S, KICK_EVERY_S, Pulse


def sent_at(now_s: float) -> Pulse:
    pulse = Pulse(heartbeat_s=1.0)
    pulse.sent(now_s)
    return pulse


def test_silence_is_broken_by_a_beat() -> None:
    pulse = sent_at(10.0)
    assert pulse.due(10.9) is None
    assert pulse.next_due() == 11.0
    assert pulse.due(11.0) == "beat"


def test_after_a_loss_the_beat_does_not_wait() -> None:
    pulse = sent_at(10.0)
    pulse.urge(10.1)
    assert pulse.due(10.1) == "beat"


def test_a_kick_follows_the_last_filled_gap_once() -> None:
    pulse = sent_at(10.0)
    pulse.filled(10.0)
    pulse.filled(10.3)
    assert pulse.due(10.3 + KICK_AFTER_S - 0.01) is None
    assert pulse.next_due() == 10.3 + KICK_AFTER_S
    assert pulse.due(10.3 + KICK_AFTER_S) == "kick"
    assert pulse.due(10.3 + KICK_AFTER_S) is None


def test_kicks_keep_their_distance() -> None:
    pulse = sent_at(10.0)
    pulse.want_kick(10.0)
    assert pulse.due(10.0) == "kick"
    pulse.filled(10.0)
    pulse.sent(11.9)
    assert pulse.due(10.0 + KICK_EVERY_S - 0.01) is None
    assert pulse.due(10.0 + KICK_EVERY_S) == "kick"


def test_news_wait_while_a_router_recovers_and_a_moment_longer() -> None:
    pulse = sent_at(10.0)
    pulse.begin_recovery(10.0)
    pulse.begin_recovery(10.1)
    pulse.end_recovery(10.2, 0)
    assert pulse.held_until(10.2)
    pulse.end_recovery(10.3, 100_000)
    assert pulse.held_until(10.45)
    assert pulse.held_until(10.6) is None


def test_no_router_holds_the_news_back_for_long_nor_twice_in_a_row() -> None:
    pulse = sent_at(10.0)
    pulse.begin_recovery(10.0)
    assert pulse.held_until(10.5) == 10.0 + HOLD_AT_MOST_S
    late_s = 10.0 + HOLD_AT_MOST_S
    assert pulse.held_until(late_s) is None
    pulse.end_recovery(late_s, 0)
    pulse.begin_recovery(late_s + 0.1)
    assert pulse.held_until(late_s + 0.1) is None
    pulse.end_recovery(late_s + 0.2, 0)
    pulse.begin_recovery(10.0 + 2 * HOLD_AT_MOST_S)
    assert pulse.held_until(10.0 + 2 * HOLD_AT_MOST_S)


def test_news_wait_from_a_kick_until_routers_have_taken_its_dump_in() -> None:
    pulse = sent_at(10.0)
    pulse.begin_recovery(10.0)  # a gap, whose hold has ended when the kick comes
    pulse.filled(10.4)
    pulse.end_recovery(10.4, 0)
    assert pulse.due(11.2) == "kick"
    assert pulse.held_until(11.2) is None
    pulse.kicked(11.2)
    assert pulse.held_until(11.21)
    pulse.begin_recovery(11.22)
    assert pulse.held_until(11.5)
    pulse.end_recovery(11.5, 100_000)
    assert pulse.held_until(11.65)
    assert pulse.held_until(12.0) is None
    pulse.sent(12.0)
    assert pulse.due(12.9) is None  # and no further kick is needed


def test_after_a_kick_that_no_router_has_heard_news_wait_for_a_moment_only() -> None:
    pulse = sent_at(10.0)
    pulse.want_kick(10.0)
    assert pulse.due(10.0) == "kick"
    pulse.kicked(10.0)
    assert pulse.held_until(10.01)
    assert pulse.held_until(10.1) is None


def test_a_kick_follows_a_recovery_that_no_hold_covered() -> None:
    pulse = sent_at(10.0)
    pulse.begin_recovery(10.0)
    pulse.end_recovery(10.1, 0)
    assert pulse.next_due() == 11.0  # a beat
    pulse.begin_recovery(11.1)  # another router's first dump, too soon for another hold
    assert pulse.held_until(11.1) is None
    pulse.end_recovery(11.2, 1000)
    pulse.sent(11.2)
    assert pulse.due(11.2 + KICK_AFTER_S) == "kick"


def test_a_dump_too_large_for_its_hold_asks_for_no_kick_after_kick() -> None:
    pulse = sent_at(10.0)
    pulse.want_kick(10.0)
    assert pulse.due(10.0) == "kick"
    pulse.kicked(10.0)
    pulse.begin_recovery(10.01)
    pulse.end_recovery(10.9, 4_000_000)
    pulse.sent(11.9)
    assert pulse.due(12.8) is None
