"""Policy files: YAML to Policy, each error with its file, line and key path; `extends` and `schedule` followed.

    load_policy("hfp8" | "my/policy.yaml" | Policy)  ->  a Policy with nothing left to look up

A name that is shipped means the shipped policy, also where a file of that name exists (`./hfp8` means the file).
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from lpcompile.errors import ParseError, PolicyError, did_you_mean, nearest_names
from lpcompile.policy.fields import Section, key_path
from lpcompile.policy.resolve import Phase, PhasePolicy, Policy
from lpcompile.policy.rules import Origin, Rule

KeyPath = tuple[str | int, ...]


def load_policy(source: str | Path | Policy) -> Policy:
    """The policy of a shipped name, a path or a Policy made in Python, with what it extends and schedules filled in."""
    if isinstance(source, Policy):
        return _link(source, _Place("policy", Path(), {}), ())
    if not isinstance(source, str | Path):
        raise PolicyError("not a policy", expected="a shipped name, a path or a Policy", got=type(source).__name__)
    return _load(*_find(source, Path()), ())


def shipped_policies() -> dict[str, Path]:
    """Name -> file of the policies that come with the package."""
    folder = Path(str(files("lpcompile"))) / "policies"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def policy_schema() -> dict[str, Any]:
    """JSON Schema of a policy file, shorthand forms included, for editors."""
    schema = Policy.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "lpcompile policy"}


@dataclass(frozen=True)
class _Place:
    """A policy file as errors name it: how it is called, where it lies, on which line each key path stands."""

    shown: str
    folder: Path
    lines: dict[KeyPath, int]

    def locate(self, path: KeyPath) -> tuple[str, int]:
        """`policy.yaml:12` and 12, of the longest part of the path that has a line."""
        while path not in self.lines and path:
            path = path[:-1]
        line = self.lines.get(path, 0)
        return (f"{self.shown}:{line}" if line else self.shown), line

    def where(self, path: KeyPath) -> str:
        return f"{self.locate(path)[0]}: {key_path(path)}"


def _find(source: str | Path, folder: Path, where: str = "") -> tuple[Path, str]:
    """The file behind a name or path, and what errors call it."""
    shipped = shipped_policies()
    if isinstance(source, str) and source in shipped:
        return shipped[source], f"{source}.yaml"
    path = folder / source
    if path.is_file():
        return path, str(path)
    kind = "a folder and not a policy file" if path.is_dir() else "neither a shipped policy nor a file"
    what = did_you_mean(f'"{source}" is {kind}', nearest_names(str(source), tuple(shipped)))
    raise PolicyError(what, where=where)


def _load(path: Path, shown: str, chain: tuple[tuple[Path, str], ...], where: str = "") -> Policy:
    """Read one file and what it names; `chain` is the files whose reading led here."""
    if path.resolve() in [visited for visited, _ in chain]:
        start = [visited for visited, _ in chain].index(path.resolve())
        names = [name for _, name in chain[start:]]
        raise PolicyError(f"the policies name each other in a circle: {' -> '.join([*names, shown])}", where=where)
    raw, lines = _read(path, shown)
    place = _Place(shown, path.parent, lines)
    policy = Policy.model_validate({"name": path.stem, **raw}, context={"locate": place.locate})
    for index, rule in enumerate(policy.rules):
        rule._origin = Origin(place.where(("rules", index)))
    return _link(policy, place, (*chain, (path.resolve(), shown)))


def _link(policy: Policy, place: _Place, chain: tuple[tuple[Path, str], ...]) -> Policy:
    """Put in what the policy extends, and the rules of the policies its schedule names."""

    def load(name: str, path: KeyPath) -> Policy:
        where = place.where(path)
        return _load(*_find(name, place.folder, where), chain, where)

    parents = [load(name, ("extends", index)) for index, name in enumerate(policy.extends)]
    linked = _merge(policy, parents)
    phases = [
        _link_phase(phase, ("schedule", index, "policy"), place, load) for index, phase in enumerate(linked.schedule)
    ]
    return linked.model_copy(update={"schedule": tuple(phases)}) if phases else linked


def _link_phase(phase: Phase, path: KeyPath, place: _Place, load: Callable[[str, KeyPath], Policy]) -> Phase:
    if phase.policy is None or phase.policy.rules is not None:
        return phase
    other = load(phase.policy.name, path)
    if other.schedule:
        raise PolicyError(f'"{other.name}" has a schedule of its own', where=place.where(path), hint="one without")
    return phase.model_copy(update={"policy": PhasePolicy(name=other.name, rules=other.rules)})


def _merge(own: Policy, parents: list[Policy]) -> Policy:
    """Own rules, then each parent's; per key the own value, then the first parent's. A schedule goes as a whole."""
    if not parents:
        return own
    rules: dict[Rule, None] = {}  # an equal rule further down never decides anything
    sections: dict[str, Any] = {}
    for policy in (own, *parents):
        rules.update(dict.fromkeys(policy.rules))
        for key in policy.model_fields_set - {"version", "name", "source", "extends", "rules"}:
            sections[key] = _over(sections[key], getattr(policy, key)) if key in sections else getattr(policy, key)
    return Policy(name=own.name, source=own.source, rules=tuple(rules), **sections)


def _over(own: Any, inherited: Any) -> Any:
    """A section with the keys that were written, its own before the inherited ones."""
    if not isinstance(own, Section) or not isinstance(inherited, Section):
        return own
    written = {key: getattr(section, key) for section in (inherited, own) for key in section.model_fields_set}
    return type(own).model_validate(written)


# YAML with line numbers


def _read(path: Path, shown: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The mapping in a file, and the line of each key path."""
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            line = f":{root.start_mark.line + 1}" if root else ""
            got = (
                "an empty file"
                if root is None
                else "a list"
                if isinstance(root, yaml.SequenceNode)
                else "a single value"
            )
            raise ParseError(
                "not a policy", where=f"{shown}{line}", expected="a mapping of keys such as rules", got=got
            )
        _check_keys(root, shown, (), ())
        raw = loader.construct_document(root)
    except UnicodeDecodeError as error:
        raise ParseError("not UTF-8 text", where=shown, got=f"byte 0x{error.object[error.start]:02x}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = 'quotes round a glob: name: "*"' if "alias" in f"{error.context} {error.problem}" else ""
        what = f"not YAML: {' '.join(filter(None, (error.context, error.problem)))}"
        raise ParseError(what, where=f"{shown}:{mark.line + 1}" if mark else shown, hint=hint) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ParseError(f"not YAML: {' '.join(str(error).split())}", where=shown) from None
    lines: dict[KeyPath, int] = {}
    _number(root, (), lines)
    return raw, lines


def _check_keys(node: yaml.Node, shown: str, path: KeyPath, above: tuple[yaml.Node, ...]) -> None:
    """Each key is text, stands once in its mapping and has a value; an alias does not contain itself."""
    where = ": ".join(filter(None, (f"{shown}:{node.start_mark.line + 1}", key_path(path))))
    if node in above:
        raise ParseError("an alias that contains itself", where=where)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _check_keys(item, shown, (*path, index), (*above, node))
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            where = ": ".join(filter(None, (f"{shown}:{line}", key_path(path))))
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (_STRING, _MERGE):
                raise PolicyError(
                    "a key is text", where=where, got=getattr(key, "value", "a list or mapping"), hint="quotes round it"
                )
            if key.value in first:
                raise PolicyError(
                    f'the key "{key.value}" stands here a second time; first on line {first[key.value]}', where=where
                )
            if value.tag == _NULL:
                what = f'the key "{key.value}" has no value'
                raise PolicyError(what, where=where, hint="a value, or removing the key")
            first[key.value] = line
            _check_keys(value, shown, (*path, key.value), (*above, node))


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


_STRING = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"
_NULL = "tag:yaml.org,2002:null"
