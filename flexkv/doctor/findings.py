"""What a check says: how it is, what was seen, what to do."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. ``remedy`` is empty where nothing has to be done."""

    check: str
    level: Level
    seen: str
    remedy: str = ""

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "check": self.check,
            "level": self.level,
            "seen": self.seen,
            "remedy": self.remedy,
        }


def ok(check: str, seen: str) -> Finding:
    """Nothing is wrong."""
    return Finding(check, "ok", seen)


def warning(check: str, seen: str, remedy: str) -> Finding:
    """It works, but not as it might, or not for ever."""
    return Finding(check, "warning", seen, remedy)


def problem(check: str, seen: str, remedy: str) -> Finding:
    """Something does not work."""
    return Finding(check, "problem", seen, remedy)


def holds(findings: Sequence[Finding]) -> bool:
    """Whether nothing is wrong; warnings are no problems."""
    return all(finding.level != "problem" for finding in findings)


def printed(findings: Sequence[Finding], *, as_json: bool) -> str:
    """The whole output: a line for each finding and one with the numbers, or one document."""
    counts = Counter(finding.level for finding in findings)
    if as_json:
        document = {
            "holds": holds(findings),
            "problems": counts["problem"],
            "warnings": counts["warning"],
            "findings": [finding.document() for finding in findings],
        }
        return json.dumps(document, indent=2)
    lines = []
    for one in findings:
        todo = f" -> {one.remedy}" if one.remedy else ""
        lines.append(f"{one.level:<7}  {one.check}: {_on_one_line(one.seen + todo)}")
    lines.append(f"{counts['problem']} problems, {counts['warning']} warnings, {counts['ok']} ok")
    return "\n".join(lines)


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
