"""Policy files: YAML to Policy, each error with its file, line and key path; `extends` and `schedule` followed.

    load_policy("hfp8" | "my/policy.yaml" | Policy)  ->  a Policy with nothing left to look up

A name that is shipped means the shipped policy, also where a file of that name exists (`./hfp8` means the file).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from lpcompile.errors import PolicyError, did_you_mean, nearest_names
from lpcompile.policy.fields import Section, key_path
from lpcompile.policy.resolve import Policy
from lpcompile.policy.rules import Origin, Rule
from lpcompile.policy.schedule import Evaluate, Phase, PhasePolicy
from lpcompile.policy.yaml_read import KeyPath, read_mapping

MOST_FILES_IN_A_CHAIN = 32


def load_policy(source: str | Path | Policy) -> Policy:
    """The policy of a shipped name, a path or a Policy made in Python, with what it extends and schedules filled in."""
    if isinstance(source, Policy):
        return _link(source, _Place("policy", Path(), {}), (), {})
    if not isinstance(source, str | Path):
        raise PolicyError("not a policy", expected="a shipped name, a path or a Policy", got=type(source).__name__)
    return _load(*_find(source, Path()), (), {})


def shipped_policies() -> dict[str, Path]:
    """Name -> file of the policies that come with the package."""
    folder = Path(str(files("lpcompile"))) / "policies"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def policy_schema() -> dict[str, Any]:
    """JSON Schema of a policy file, shorthand forms included, for editors."""
    schema = Policy.model_json_schema()
    anchors = {"patternProperties": {"^x-": {"description": "Not read: a place for anchors."}}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, **anchors, "title": "lpcompile policy"}


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
    path, text = folder / source, str(source)
    try:
        path.stat()  # raises for a name that no file can have
        if path.is_file():
            return path, str(path)
        kind = "a folder and not a policy file" if path.is_dir() else "neither a shipped policy nor a file"
    except FileNotFoundError:
        kind = "neither a shipped policy nor a file"
    except (OSError, ValueError) as error:
        kind = f"not the name of a file ({getattr(error, 'strerror', None) or error})"
    shown = text if len(text) <= 100 else f"{text[:60]}... ({len(text)} characters)"
    guess, _, _ = nearest_names(text[:100], tuple(shipped)).partition("Known")
    what = did_you_mean(f'"{shown}" is {kind}', f"{guess}Known: a path, or one of `lpcompile policy list`")
    raise PolicyError(what, where=where)


_Loaded = dict[Path, Policy]


def _load(path: Path, shown: str, chain: tuple[tuple[Path, str], ...], loaded: _Loaded, where: str = "") -> Policy:
    """Read one file and what it names; `chain` is the files whose reading led here, `loaded` those read already."""
    if path.resolve() in [visited for visited, _ in chain]:
        start = [visited for visited, _ in chain].index(path.resolve())
        names = [name for _, name in chain[start:]]
        raise PolicyError(f"the policies name each other in a circle: {' -> '.join([*names, shown])}", where=where)
    if len(chain) >= MOST_FILES_IN_A_CHAIN:
        what = f"a chain of more than {MOST_FILES_IN_A_CHAIN} files that extend each other"
        raise PolicyError(what, where=where, hint="fewer files")
    if path.resolve() in loaded:
        return loaded[path.resolve()]
    raw, lines = read_mapping(path, shown, "policy", "keys such as rules")
    raw = {key: value for key, value in raw.items() if not key.startswith("x-")}  # they hold anchors
    place = _Place(shown, path.parent, lines)
    policy = Policy.model_validate({"name": path.stem, **raw}, context={"locate": place.locate})
    is_shipped = path in shipped_policies().values()
    for keys, rules in _written_rules(policy):
        for index, rule in enumerate(rules):
            rule._origin = Origin(place.where((*keys, "rules", index)), str(path), is_shipped)
    linked = loaded[path.resolve()] = _link(policy, place, (*chain, (path.resolve(), shown)), loaded)
    return linked


def _written_rules(policy: Policy) -> Iterator[tuple[KeyPath, tuple[Rule, ...]]]:
    """The rules that stand in a file: its own, and those that a phase or evaluation has in place of a name."""
    yield (), policy.rules
    for index, phase in enumerate(policy.schedule):
        for key, other in phase.named.items():
            yield ("schedule", index, key), other.rules or ()
    if policy.evaluate is not None:
        yield ("evaluate", "policy"), policy.evaluate.policy.rules or ()


def _link(policy: Policy, place: _Place, chain: tuple[tuple[Path, str], ...], loaded: _Loaded) -> Policy:
    """Put in what the policy extends, and the rules of the policies its schedule names."""

    def load(name: str, path: KeyPath) -> Policy:
        where = place.where(path)
        return _load(*_find(name, place.folder, where), chain, loaded, where)

    parents = [load(name, ("extends", index)) for index, name in enumerate(policy.extends)]
    linked = _merge(policy, parents)

    def rules_of(name: str, path: KeyPath) -> tuple[Rule, ...]:
        other = load(name, path)
        if other.schedule:
            raise PolicyError(f'"{other.name}" has a schedule of its own', where=place.where(path), hint="one without")
        return other.rules

    def linked_phase(index: int, phase: Phase) -> Phase:
        return phase.link(lambda key, name: rules_of(name, ("schedule", index, key)))

    phases = [linked_phase(index, phase) for index, phase in enumerate(linked.schedule)]
    evaluate = linked.evaluate
    if evaluate is not None and evaluate.policy.rules is None:
        name = evaluate.policy.name
        evaluate = Evaluate(policy=PhasePolicy(name=name, rules=rules_of(name, ("evaluate", "policy"))))
    return linked.model_copy(update={"schedule": tuple(phases), "evaluate": evaluate})


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
