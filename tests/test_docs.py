"""The pages that are written by hand, where the code knows better."""

import ast
import re
from pathlib import Path

from data.shards import manifest
from pipeline.checkpoint import reader, weights
from pipeline.run import events

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"
IN_OTHER_FILES = {"start", "end"}
"""Events of slurm/starts.jsonl."""


def written_events():
    """The names that events.jsonl may have: of calls that write one, of rows that are one, and of events.py."""
    trees = [ast.parse(file.read_text()) for folder in ("pipeline", "slurm") for file in (ROOT / folder).rglob("*.py")]
    found = [*events.BEGIN_EVENTS, *events.HANG_EVENTS, *events._FIELDS]
    for node in (node for tree in trees for node in ast.walk(tree)):
        values = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            named = node.func.attr in ("write", "warn", "timed", "_emit")
            values = [each for each in node.args[:1] if named and not isinstance(each, ast.Dict)]
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            values = [value for key, value in pairs if isinstance(key, ast.Constant) and key.value == "event"]
        found += [each.value for value in values for each in ast.walk(value) if isinstance(each, ast.Constant)]
    return {name for name in found if isinstance(name, str) and re.fullmatch(r"[a-z_]{4,}", name)} - IN_OTHER_FILES


def test_the_page_of_events_has_all_that_the_code_writes_and_no_other():
    rows = (REFERENCE / "metrics.md").read_text().partition("## events.jsonl")[2].splitlines()
    documented = {name for row in rows if row.startswith("| `") for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert documented == written_events()


def test_the_page_of_formats_has_the_numbers_of_the_code():
    page = (REFERENCE / "formats.md").read_text()
    assert f"| a set's `manifest.json` | {manifest.FORMAT} | 1 |" in page
    assert f"| a checkpoint's `manifest.json` | {reader.FORMAT} |" in page
    assert f"| an exported `.safetensors` file | {weights.FORMAT} |" in page
