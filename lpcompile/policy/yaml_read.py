"""Reading YAML: one mapping with the line of each key path, and a sentence for everything that is not one.

    read_mapping(path, "policy.yaml", "policy")  ->  {"rules": [...]}, {("rules", 0): 3, ...}

A file is small, shallow and says each value outright. What grows when it is read (aliases of aliases), nests without
end, or names types by tags is refused before anything is built from it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lpcompile.errors import ParseError, PolicyError
from lpcompile.policy.fields import key_path

KeyPath = tuple[str | int, ...]

MOST_BYTES, MOST_DEPTH, MOST_VALUES, MOST_DIGITS = 1 << 20, 32, 20_000, 40


def read_mapping(
    path: Path, shown: str, what: str, keys: str, may_be_empty: bool = False
) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The mapping in a file, and the line of each key path. `what` the file is called, `keys` what it may hold;
    `may_be_empty`: a file without any, and a key without a value.
    """
    text = _read_text(path, shown, what)
    try:
        _check_events(text, shown)
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None and may_be_empty:
            return {}, {}
        if not isinstance(root, yaml.MappingNode):
            line = f":{root.start_mark.line + 1}" if root else ""
            got = "an empty file" if root is None else _KINDS.get(type(root), "a single value")
            raise ParseError(f"not a {what}", where=f"{shown}{line}", expected=f"a mapping of {keys}", got=got)
        _check_size(root, shown)
        _check_keys(root, shown, (), set(), may_be_empty)
        raw: dict[str, Any] = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(filter(None, (error.context, error.problem)))
        where = f"{shown}:{mark.line + 1}" if mark else shown
        line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
        raise ParseError(f"not YAML: {problem}", where=where, hint=_hint_for(line)) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ParseError(f"not YAML: {' '.join(str(error).split())}", where=shown) from None
    lines: dict[KeyPath, int] = {}
    _number(root, (), lines)
    return raw, lines


def _read_text(path: Path, shown: str, what: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ParseError(f"too long for a {what}", where=shown, expected=f"at most {MOST_BYTES} bytes")
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ParseError("not UTF-8 text", where=shown, got=f"byte 0x{error.object[error.start]:02x}") from None
    except OSError as error:
        raise ParseError("this file cannot be read", where=shown, got=error.strerror or str(error)) from None


class _Loader(yaml.SafeLoader):
    """YAML's values without dates, which are text here."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rows if not tag.endswith(":timestamp")]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _check_events(text: str, shown: str) -> None:
    """Depth, tags and lengths of numbers, from the parser's events: nothing is built yet."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        where = f"{shown}:{event.start_mark.line + 1}" if event.start_mark else shown
        tag = getattr(event, "tag", None)
        if tag is not None and tag != "!":
            short = re.sub(r"^tag:yaml.org,2002:", "!!", tag)
            hint = f'quotes round it: "{short}", if it is text' if tag[:1] == "!" else "the value without it"
            raise ParseError(f"{short} is read as a tag, which names a type", where=where, hint=hint)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MOST_DEPTH:
                raise ParseError("nested too deeply", where=where, expected=f"at most {MOST_DEPTH} levels")
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.ScalarEvent) and event.style is None and event.value[:1] in _ODD:
            odd = event.value[0]
            raise ParseError(f"{_ODD[odd]} where a value or a key begins", where=where, hint=_PLAIN[odd])
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > MOST_DIGITS and _is_number(event):
            what = f"a number of {len(event.value)} characters"
            raise ParseError(what, where=where, expected=f"at most {MOST_DIGITS}")


def _is_number(event: yaml.ScalarEvent) -> bool:
    return event.style is None and re.fullmatch(r"[-+]?[0-9][-+.0-9_:xabcdefo]*", event.value.lower()) is not None


def _check_size(root: yaml.Node, shown: str) -> None:
    """How many values there are once each alias is read as what it stands for. An alias does not contain itself."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, path: KeyPath, above: tuple[yaml.Node, ...]) -> int:
        if node in above:
            where = ": ".join(filter(None, (f"{shown}:{node.start_mark.line + 1}", key_path(path))))
            raise ParseError("an alias that contains itself", where=where)
        if id(node) not in sizes:
            children: list[tuple[str | int, yaml.Node]] = []
            if isinstance(node, yaml.SequenceNode):
                children = list(enumerate(node.value))
            if isinstance(node, yaml.MappingNode):
                children = [(str(key.value), value) for key, value in node.value]
            sizes[id(node)] = 1 + sum(size(child, (*path, part), (*above, node)) for part, child in children)
        return sizes[id(node)]

    if (total := size(root, (), ())) > MOST_VALUES:
        got = f"{total}, with each alias read as what it stands for"
        raise ParseError("too many values", where=shown, expected=f"at most {MOST_VALUES}", got=got)


def _check_keys(node: yaml.Node, shown: str, path: KeyPath, seen: set[int], may_be_empty: bool) -> None:
    """Each key is text, stands once in its mapping and has a value."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _check_keys(item, shown, (*path, index), seen, may_be_empty)
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            where = ": ".join(filter(None, (f"{shown}:{line}", key_path(path))))
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (_STRING, _MERGE):
                raise PolicyError(
                    "a key is text", where=where, got=getattr(key, "value", "a list or mapping"), hint="quotes round it"
                )
            if odd := next((char for char in key.value if char in _ODD), ""):
                raise ParseError(f"a key with {_ODD[odd]}", where=where, got=key.value.strip(), hint=_PLAIN[odd])
            if key.value in first:
                raise PolicyError(
                    f'the key "{key.value}" stands here a second time; first on line {first[key.value]}', where=where
                )
            if value.tag == _NULL and not may_be_empty:
                what = f'the key "{key.value}" has no value'
                raise PolicyError(what, where=where, hint="a value, or removing the key")
            first[key.value] = line
            _check_keys(value, shown, (*path, key.value), seen, may_be_empty)


def _number(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int]) -> None:
    """Write down the line of each key path: of a value on one line its own, of a mapping or list that of its key."""
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _number(item, (*path, index), lines)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            mark = value.start_mark if isinstance(value, yaml.ScalarNode) else key.start_mark
            lines[(*path, key.value)] = mark.line + 1
            _number(value, (*path, key.value), lines)


def _hint_for(line: str) -> str:
    """What is wrong with a line that is not YAML, where a glob or a copied character explains it."""
    if odd := next((char for char in line if char in _ODD), ""):
        return _PLAIN[odd]
    if found := re.search(r"(?:^|[\s{,-])(name|not|class|layers)\s*:\s*([^\s\"'#][^\s,}]*)", line):
        key, value = found.groups()
        if re.search(r"[*?!\[\]{}&|%@]", value):
            return f'quotes round a glob: {key}: "{value}"'
    return ""


_STRING = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"
_NULL = "tag:yaml.org,2002:null"
_KINDS: Mapping[type[yaml.Node], str] = {yaml.SequenceNode: "a list"}
_CURLY = "\u201c\u201d\u2018\u2019\u201e\u00ab\u00bb"
_ODD: Mapping[str, str] = {"\u00a0": "a no-break space", "\t": "a tab"} | dict.fromkeys(_CURLY, "curly quotes")
_PLAIN: Mapping[str, str] = {"\u00a0": "plain spaces", "\t": "spaces"} | dict.fromkeys(_CURLY, 'straight quotes: "')
