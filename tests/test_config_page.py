"""The page on settings is what the settings are; run this file to renew its tables."""

from __future__ import annotations

import json
import re
from pathlib import Path

from flexkv.config import CacheConfig, Config, EventsConfig, TransfersConfig
from flexkv.config_checks import Settings, allowed_values
from flexkv.config_sources import (
    DYNAMO_CREDENTIALS,
    DYNAMO_VARIABLES,
    FLAT_KEYS,
    VARIABLES,
    path_of,
)
from tests.config_forms import load_text

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"


def tables() -> dict[str, str]:
    """The tables of the page, by the name in their marker."""
    made = {
        "top": _keys(Config, ""),
        "cache": _keys(CacheConfig, "cache"),
        "transfers": _keys(TransfersConfig, "transfers"),
        "events": _keys(EventsConfig, "events"),
    }
    variable_of = {key: variable for variable, key in VARIABLES.items()}
    flat = [
        f"| `{key}` | `{variable_of[key]}` | `{path_of(section, field)}` |"
        for key, (section, field, _) in FLAT_KEYS.items()
    ]
    made["flat"] = "\n".join(["| Flat key | Variable | Stands for |", "| --- | --- | --- |", *flat])
    pairs = dict(DYNAMO_VARIABLES)
    for way in DYNAMO_CREDENTIALS:
        pairs |= way
    rows = [f"| `{variable}` | `events.{field}` |" for variable, field in pairs.items()]
    made["dynamo"] = "\n".join(["| Dynamo's variable | Fills in |", "| --- | --- |", *rows])
    return made


def _keys(settings: type[Settings], section: str) -> str:
    rows = ["| Key | Default | Allowed | Meaning |", "| --- | --- | --- | --- |"]
    for name, field in settings.model_fields.items():
        default = field.get_default()
        if isinstance(default, Settings):
            continue
        shown = "" if default in (None, ()) else f"`{json.dumps(default)}`"
        allowed = allowed_values(field).replace("|", "\\|").replace("<", "&lt;")
        rows.append(f"| `{path_of(section, name)}` | {shown} | {allowed} | {field.description} |")
    return "\n".join(rows)


def with_tables(page: str) -> str:
    for name, table in tables().items():
        begin, end = f"<!-- table: {name} -->\n", "\n<!-- end -->"
        assert begin in page, f"the page has no table {name}"
        head, rest = page.split(begin)
        page = head + begin + table + rest[rest.index(end) :]
    return page


def test_the_page_lists_every_key_as_it_is() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "run: python -m tests.test_config_page"


def test_the_example_of_the_page_loads(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    examples = re.findall(r"```(json|yaml)\n(.*?)```", page, re.DOTALL)
    assert {kind for kind, _ in examples} == {"json", "yaml"}
    for kind, text in examples:
        load_text(tmp_path, f"example.{kind}", text)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
