"""YAML 1.2's core schema, with PyYAML as the parser, which has YAML 1.1's types.

Those read 12:00:00 as 43200, 0123 as 83, no as false and 2024-11-05 as a date, and of a key that is given twice the
last one wins. Here these are text, 123, text, text, and an error. A value whose key takes text is what was typed, also
where it looks like a number or a boolean: 007 stays 007. Only null is null. On a command line nothing of it is YAML.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_CORE: dict[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    _TAG + kind: (re.compile(rf"(?:{pattern})\Z"), value)
    for kind, pattern, value in (
        ("null", r"null|Null|NULL|~|", lambda text: None),
        ("bool", r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
        ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", lambda text: int(text, 0 if text[1:2] in ("o", "x") else 10)),
        (
            "float",
            r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
            lambda text: float(re.sub(r"\.(?=[in])", "", text.lower())),
        ),
        ("str", r"(?s:.*)", str),
    )
}
"""The core schema's tags: how a scalar is written, and its value. A plain scalar has the first that fits."""
_MAX_VALUES = 10_000
"""Of a document, with what aliases repeat: a few lines of them can stand for more than fits into memory."""


class YamlError(ValueError):
    """What is wrong with a document, and in which line."""

    def __init__(self, problem: str, line: int) -> None:
        super().__init__(f"line {line}: {problem}")
        self.problem = problem


class _Loader(yaml.BaseLoader):
    """Reads plain scalars as the core schema's types; BaseLoader by itself knows none."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""


for _tag, (_pattern, _) in _CORE.items():
    if _tag != _TAG + "str":
        _Loader.add_implicit_resolver(_tag, _pattern, None)
        _Dumper.add_implicit_resolver(_tag, _pattern, None)


def read_yaml(text: str, takes_text: Callable[[str], bool] = lambda key: False, key: str = "") -> Any:
    """The value of a document; `takes_text` says of a key's full name whether it takes text.

    `key`: the full name of the key that a command line sets to this value, all of which must be taken as it is.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        if key and text[node.end_mark.index if node else 0 :].lstrip().startswith("#"):
            raise YamlError("what follows the # would be a comment; quote the value", 1)
        if key and any(map(_is_interpreted, yaml.scan(text))):
            raise YamlError("an anchor (&), alias (*), tag (!) or line break would not be taken as typed; quote it", 1)
        return None if node is None else _value(node, takes_text, key, count(1))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(filter(None, (error.context, error.problem)))
        hint = "; YAML is indented with spaces" if r"'\t'" in problem else ""
        raise YamlError(f"not YAML: {problem}{hint}", mark.line + 1 if mark else 1) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(f"not YAML: it contains the control character {chr(error.character)!r}", line) from None
    except RecursionError:
        raise YamlError("nested too deeply, or an alias that contains itself", 1) from None


def read_typed(text: str) -> str | None:
    """The value of a key that takes text, from a command line: null, or as typed, without quotes around all of it."""
    if _CORE[_TAG + "null"][0].match(text):
        return None
    try:
        text.encode()
        node = yaml.compose(text, Loader=_Loader) if text[0] in "'\"" and len(text.splitlines()) == 1 else None
    except UnicodeEncodeError:
        raise YamlError("not UTF-8", 1) from None
    except yaml.YAMLError:
        return text
    return node.value if isinstance(node, yaml.ScalarNode) and node.end_mark.index == len(text) else text


def write_yaml(tree: Any) -> str:
    """A document that reads as an equal tree by YAML 1.2 and 1.1."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)


def _is_interpreted(token: yaml.Token) -> bool:
    """Whether a part of a value stands for something else than it says."""
    if isinstance(token, yaml.ScalarToken) and token.style not in ("|", ">"):
        return token.start_mark.line != token.end_mark.line
    return isinstance(token, yaml.AnchorToken | yaml.AliasToken | yaml.TagToken)


def _value(node: yaml.Node, takes_text: Callable[[str], bool], key: str, values: Iterator[int]) -> Any:
    """A node's value; the items of a list have the key of the list."""
    line = node.start_mark.line + 1
    if next(values) > _MAX_VALUES:
        raise YamlError(f"more than {_MAX_VALUES:,} values; aliases (*) count as what they repeat", line)
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        return [_value(item, takes_text, key, values) for item in node.value]
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        return _mapping(node, takes_text, key, values)
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _CORE:
        raise YamlError(f"{node.tag.replace(_TAG, '!!')} is not a type of YAML's core schema", line)
    if takes_text(key) and node.tag != _TAG + "null":
        return node.value
    pattern, value = _CORE[node.tag]
    try:
        if pattern.match(node.value):
            return value(node.value)
    except ValueError:  # more digits than Python reads
        pass
    raise YamlError(f"{node.value[:40]!r} cannot be read as {node.tag.replace(_TAG, '!!')}", line)


def _mapping(node: yaml.MappingNode, takes_text: Callable[[str], bool], key: str, values: Iterator[int]) -> Any:
    mapping: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for name, value in node.value:
        line = name.start_mark.line + 1
        if not isinstance(name, yaml.ScalarNode):
            raise YamlError("a key must be text, not a list or a mapping", line)
        full = f"{key}.{name.value}".lstrip(".")
        if name.value == "<<":
            raise YamlError("merge keys (<<) are not part of YAML 1.2; write the keys out, or share a base:", line)
        if name.value in lines:
            before = f", here and in line {lines[name.value]}" if lines[name.value] != line else ""
            raise YamlError(f"{full} is given twice{before}", line)
        lines[name.value] = line
        mapping[name.value] = _value(value, takes_text, full, values)
    return mapping
