"""YAML file + mode + overrides -> `Config`, or one error that lists every problem.

Precedence, highest first: `--set train.epochs=3`, the YAML file, the mode, the schema's default.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from doccls.config.idle_keys import find_idle_keys
from doccls.config.paths import find_problem, resolve_option
from doccls.config.schema import SECTIONS, Config, Operational
from doccls.config.snapshot import SnapshotLoader
from doccls.errors import UserError

MODES = get_args(Config.model_fields["mode"].annotation)
Key = tuple[str, ...]

_MAX_DEPTH = 20
# No key of the schema may match: its value would reach logs, snapshots and W&B.
SECRET_NAME = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
_SECRET_ARGUMENT = re.compile(rf"(?s)^(.*?(?:{SECRET_NAME.pattern})[^=]*=).*$", re.IGNORECASE)


@dataclass(frozen=True)
class Override:
    """One `--set key=value`, or a flag that is short for one."""

    key: str
    value: Any
    where: str


@dataclass(frozen=True)
class _Stated:
    """A value and where it was stated."""

    value: Any
    where: str


@dataclass(frozen=True)
class LoadedConfig:
    """A resolved config, and warnings about stated keys: those without effect, and those that override the mode."""

    config: Config
    warnings: tuple[str, ...]


def load_config(path: Path, mode: str | None = None, overrides: Sequence[Override] = ()) -> Config:
    """Read the config at `path` as `load_with_warnings` does, for commands that don't train."""
    return load_with_warnings(path, mode, overrides).config


def load_with_warnings(path: Path, mode: str | None = None, overrides: Sequence[Override] = ()) -> LoadedConfig:
    """Read the config at `path` and resolve it: apply the mode and the overrides, make paths absolute.

    Raises:
        UserError: the file can't be read or parsed, or keys or values in it are wrong (all are listed).
    """
    path = resolve_option(path, "--config")
    problems: list[str] = []
    stated = _flatten(_read_yaml(path, problems), problems)
    set_by_flags = _flatten([(tuple(o.key.split(".")), _Stated(o.value, o.where)) for o in overrides], problems)
    chosen = _Stated(mode, "--mode") if mode else (stated | set_by_flags).get(("mode",), _Stated("basic", "default"))
    if chosen.value not in MODES:
        problems.append(_render_problem(("mode",), chosen, " or ".join(map(repr, MODES))))
        chosen = _Stated("basic", "default")
    defaults = _flatten(read_mode(chosen.value), problems)
    merged = {**defaults, **stated, **set_by_flags, ("mode",): chosen}
    is_snapshot = ("provenance",) in stated  # its paths are resolved: a `$` in them is part of a name
    expanded = set_by_flags if is_snapshot else merged
    config = _validate(merged, path, {key[-1] for key in expanded}, problems)
    by_user = set_by_flags if is_snapshot else stated | set_by_flags  # a snapshot states every key
    idle = find_idle_keys(config, {".".join(key): value.where for key, value in by_user.items()})
    return LoadedConfig(config, (*_describe_clash(stated, defaults, chosen), *idle))


def _describe_clash(stated: dict[Key, _Stated], defaults: dict[Key, _Stated], chosen: _Stated) -> list[str]:
    """Return a warning if a mode chosen on the command line meets a file whose keys override it, else nothing."""
    in_file = stated.get(("mode",))
    if not chosen.where.startswith("--") or (in_file is not None and in_file.value == chosen.value):
        return []
    kept = [".".join(key) for key, of_mode in defaults.items() if key in stated and stated[key].value != of_mode.value]
    if not kept:
        return []
    return [
        f"{chosen.where} {chosen.value}: the config file states other values than this mode, and they are kept: "
        f"{', '.join(kept)}"
    ]


def parse_override(text: str) -> Override:
    """Parse `train.epochs=3`; the value is YAML, so `null`, `true`, `[1, 2]` and `1e-3` have their YAML types.

    Raises:
        UserError: there is no `=`, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text!r}: write key=value, for example --set train.epochs=3")
    try:
        return Override(key.strip(), _parse_value(value), f"--set {key.strip()}")
    except yaml.YAMLError as error:
        raise UserError(f"--set {key.strip()}: the value is not YAML: {_describe_yaml_error(error)}") from error


def render_snapshot(config: Config, provenance: dict[str, Any]) -> str:
    """Render the resolved config and its provenance as YAML that `load_config` reads back to the same config."""
    return _dump(config.model_dump(mode="json") | {"provenance": provenance})


def complete_snapshot(text: str, provenance: Mapping[str, Any]) -> str | None:
    """Add the entries that the snapshot's provenance lacks; return None if it lacks none."""
    known = yaml.load(text, SnapshotLoader)["provenance"]  # noqa: S506 (a safe loader)
    missing = {name: value for name, value in provenance.items() if name not in known}
    if not missing:
        return None
    values = _parse_value(text)
    return _dump(values | {"provenance": values["provenance"] | missing})


def list_values(config: Config) -> list[tuple[str, Any]]:
    """List every dotted key and its resolved value, in the schema's order, without `provenance`."""
    values = config.model_dump(mode="json", exclude={"provenance"})
    return [(".".join(key), value) for key, value in _leaves(values)]


def redact_argument(argument: str) -> str:
    """Make a command-line argument safe to log: replace the value of `api_key=...` and the like by stars."""
    return _SECRET_ARGUMENT.sub(r"\1***", argument)


# --- YAML ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's numbers: `1e-3` is a float (in YAML 1.1 it is a string)."""


_Loader.yaml_implicit_resolvers = {  # a copy: `add_implicit_resolver` would change SafeLoader's lists in place
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
               r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)  # fmt: skip


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every string that `_Loader` would not read as a string."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _dump(values: dict[str, Any]) -> str:
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def _parse_value(text: str) -> Any:
    return _Loader(text).get_single_data()


def _read_yaml(path: Path, problems: list[str]) -> list[tuple[Key, _Stated]]:
    problem = find_problem(path, "config file")
    if problem is not None:
        raise UserError(f"--config: {problem}")
    try:
        return _parse_yaml(path.read_text(encoding="utf-8-sig"), str(path), problems)
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config file {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _parse_yaml(text: str, source: str, problems: list[str]) -> list[tuple[Key, _Stated]]:
    """List the values in order, each with its dotted key and line; a duplicate key is a problem."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            raise UserError(f"{source}: the file is empty; it needs at least data.train_csv and data.image_dir_train")
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{source}: the top level must be `key: value` lines")
        return list(_read_mapping(loader, root, (), source, problems))
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {_describe_yaml_error(error)}") from error


def _read_mapping(
    loader: _Loader, node: yaml.MappingNode, prefix: Key, source: str, problems: list[str]
) -> Iterator[tuple[Key, _Stated]]:
    if len(prefix) > _MAX_DEPTH:  # an anchor that contains itself
        raise yaml.composer.ComposerError(None, None, "a mapping within itself", node.start_mark)
    first_line: dict[str, int] = {}
    for key_node, _ in node.value:  # before `<<:` is resolved: overriding a merged key is no duplicate
        name, line = str(key_node.value), key_node.start_mark.line + 1
        if name in first_line and name != "<<":
            key = ".".join((*prefix, name))
            problems.append(f"{key} ({source}:{line}): stated twice, first in line {first_line[name]}")
        first_line.setdefault(name, line)
    loader.flatten_mapping(node)  # puts merged keys first, so that the mapping's own win
    for name, (key_node, value_node) in {str(pair[0].value): pair for pair in node.value}.items():
        key_path = (*prefix, name)
        if isinstance(value_node, yaml.MappingNode) and key_path != ("provenance",):
            yield from _read_mapping(loader, value_node, key_path, source, problems)
        else:
            line = key_node.start_mark.line + 1
            yield key_path, _Stated(loader.construct_object(value_node, deep=True), f"{source}:{line}")


def read_mode(mode: str) -> list[tuple[Key, _Stated]]:
    """Return the keys and values that the mode sets."""
    text = resources.files("doccls.config").joinpath(f"modes/{mode}.yaml").read_text(encoding="utf-8")
    return _parse_yaml(text, f"mode {mode}", [])


# --- merging and validation ------------------------------------------------------------------------------------------


def _flatten(values: list[tuple[Key, _Stated]], problems: list[str]) -> dict[Key, _Stated]:
    """Map keys to values; a plain value for a section is a problem (an empty section, as in `train:`, is not)."""
    flat: dict[Key, _Stated] = {}
    for key, stated in values:
        if len(key) == 1 and key[0] in SECTIONS:
            if stated.value is not None:
                problems.append(_render_problem(key, stated, f"a section: keys such as {_examples(key[0])} under it"))
        else:
            flat[key] = stated
    return flat


def _validate(merged: dict[Key, _Stated], path: Path, expanded: set[str], problems: list[str]) -> Config:
    """Validate the values; the names of keys whose paths may have variables are `expanded`."""
    known: dict[str, Any] = {name: {} for name in SECTIONS}
    for key, stated in merged.items():
        section = SECTIONS.get(key[0])
        if len(key) == 2 and section is not None and key[1] in section.model_fields:
            known[key[0]][key[1]] = stated.value
        elif len(key) == 1 and key[0] in Config.model_fields:
            known[key[0]] = stated.value
        else:
            problems.append(_render_unknown(key, stated))
    try:
        config = Config.model_validate(known, context={"base": path.parent, "expanded": expanded})
    except ValidationError as error:
        problems.extend(_render_errors(error, merged))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"config {path}: {count}\n" + "\n".join(f"  {problem}" for problem in problems))
    return config


def _render_errors(error: ValidationError, merged: dict[Key, _Stated]) -> list[str]:
    """Render one line per key: pydantic reports a union once for each of its members."""
    lines: dict[Key, str] = {}
    for item in error.errors(include_url=False):
        key = tuple(str(part) for part in item["loc"][:2])
        if item["type"] == "contradiction":
            for name, allowed in item["ctx"]["allowed"].items():
                field = SECTIONS[key[0]].model_fields[name]
                stated = merged.get((*key, name), _Stated(field.default, "default"))
                lines[*key, name] = _render_problem((*key, name), stated, allowed)
            continue
        field = SECTIONS[key[0]].model_fields[key[1]] if len(key) == 2 else Config.model_fields[key[0]]
        if item["type"] == "missing" and len(item["loc"]) == len(key):
            lines[key] = f"{'.'.join(key)}: missing; required: {describe_allowed(field)}"
        else:
            stated = merged.get(key, _Stated(item["input"], "default"))
            reason = f"{item['ctx']['reason']}; " if "reason" in item.get("ctx", {}) else ""
            lines[key] = _render_problem(key, stated, describe_allowed(field), reason)
    return list(lines.values())


def _render_problem(key: Key, stated: _Stated, allowed: str, reason: str = "") -> str:
    return f"{'.'.join(key)} = {stated.value!r} ({stated.where}): {reason}allowed: {allowed}"


def _render_unknown(key: Key, stated: _Stated) -> str:
    known = [f"{name}.{field}" for name, section in SECTIONS.items() for field in section.model_fields]
    dotted = ".".join(key)
    near = (
        [candidate for candidate in known if candidate.split(".")[1] == key[-1]]  # the right name in the wrong section
        or get_close_matches(dotted, known, n=1, cutoff=0.6)
        or get_close_matches(key[-1], known, n=1, cutoff=0.5)
    )
    hint = f"did you mean {near[0]}?" if near else f"sections are {', '.join(SECTIONS)}"
    return f"{dotted} ({stated.where}): unknown key; {hint}"


def describe_allowed(field: FieldInfo) -> str:
    """Describe the values that a field allows, as in `an integer >= 1 or null`."""
    return _describe(field.annotation, list(field.metadata))


def _describe(annotation: Any, metadata: list[Any]) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *extra = get_args(annotation)
        return _describe(base, [*metadata, *extra])
    if origin in (Union, UnionType):
        return " or ".join(_describe(member, []) for member in get_args(annotation))
    if origin is Literal:
        return " or ".join(repr(value) for value in get_args(annotation))
    if origin is tuple:
        texts = str in get_args(annotation)
        return "a list of strings (quote each)" if texts else "three numbers, as [0.5, 0.5, 0.5]"
    bounds = [f"{sign} {limit}" for sign, limit in _bounds(metadata)]
    names: dict[Any, str] = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        Path: "a path",
        NoneType: "null",
    }
    if annotation is str:
        pattern = next((m.pattern for m in _unwrap(metadata) if getattr(m, "pattern", None)), None)
        return f"a string that matches {pattern}" if pattern else "a string (quote it if it looks like a number)"
    return " ".join([names.get(annotation, "a mapping"), " and ".join(bounds)]).strip()


def _unwrap(metadata: list[Any]) -> Iterator[Any]:
    for item in metadata:
        yield from _unwrap(item.metadata) if isinstance(item, FieldInfo) else (item,)


def _bounds(metadata: list[Any]) -> Iterator[tuple[str, float]]:
    for item in _unwrap(metadata):
        for kind, sign, name in ((Ge, ">=", "ge"), (Gt, ">", "gt"), (Le, "<=", "le"), (Lt, "<", "lt")):
            if isinstance(item, kind):
                yield sign, getattr(item, name)


def _examples(section: str) -> str:
    return ", ".join(list(SECTIONS[section].model_fields)[:3])


def _leaves(values: dict[str, Any], prefix: Key = ()) -> Iterator[tuple[Key, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def _describe_yaml_error(error: yaml.YAMLError) -> str:
    """Describe the error and its position without quoting the line, which may contain a secret."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"character {error.position + 1}: {error.reason}"
    return type(error).__name__


def operational_keys(model: type[BaseModel] = Config, prefix: Key = ()) -> set[Key]:
    """Return the keys marked `Operational` in the schema, which are not part of a run's fingerprint."""
    found: set[Key] = set()
    for name, field in model.model_fields.items():
        if any(isinstance(mark, Operational) for mark in field.metadata):
            found.add((*prefix, name))
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= operational_keys(field.annotation, (*prefix, name))
    return found
