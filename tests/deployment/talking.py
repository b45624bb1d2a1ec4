"""Conversations that go on whatever is killed."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self

from tests.deployment.asking import fresh_text

if TYPE_CHECKING:
    from tests.deployment.asking import Answer
    from tests.deployment.truth import Deployment

_PAUSE_S = 0.3
_WORDS_MORE = 12
_LONGEST = 2400  # characters: below the model's context
_SEEN_S = 60.0


class Talk:
    """Some conversations at once, each of them one turn after another, until the block ends."""

    def __init__(self, direct: Deployment, num_conversations: int = 4) -> None:
        self._direct = direct
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._converse, daemon=True) for _ in range(num_conversations)
        ]
        self.answers: list[Answer] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(_SEEN_S)

    @property
    def failures(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.is_good]

    @property
    def slowest_s(self) -> float:
        return max(answer.seconds for answer in self.answers)

    def wait_for_answers(self, more: int) -> None:
        wanted = len(self.answers) + more
        self._direct.stack.until(lambda: len(self.answers) >= wanted, _SEEN_S, "conversations")

    def _converse(self) -> None:
        rng = self._direct.rng
        text = ""
        while not self._stopping.wait(_PAUSE_S):
            with self._lock:
                if not text or len(text) > _LONGEST:
                    text = fresh_text(rng, 40)
                else:
                    text += " " + fresh_text(rng, _WORDS_MORE)
                self._direct.remember(text)
            answer = self._direct.stack.chat(text)
            self.answers.append(answer)
            text += answer.text if answer.text.isascii() else ""
