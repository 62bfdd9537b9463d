"""A run's snapshot, `config.yaml`, as plain values: also one that another version of doccls wrote."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from doccls.config.paths import describe_error
from doccls.errors import UserError

# Seven times as fast, where PyYAML has been built with libyaml; its messages are not those of PyYAML's own loader.
SnapshotLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_snapshot(path: Path) -> dict[str, Any]:
    """Read a snapshot without validating its keys; it has a mapping `provenance`.

    Raises:
        UserError: it can't be read, or is not the snapshot of a run.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = None if _has_aliases(text) else yaml.load(text, SnapshotLoader)  # noqa: S506 (a safe loader)
        if not isinstance(values, dict) or not isinstance(values.get("provenance"), dict):
            raise ValueError("no provenance")
    except OSError as error:
        raise UserError(describe_error(error, path, "file")) from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: damaged, or not a snapshot of a run") from error
    return values


def _has_aliases(text: str) -> bool:
    """Return whether the YAML repeats nodes: no snapshot does, and a few lines of aliases can stand for gigabytes."""
    return "&" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, SnapshotLoader))


def flatten_settings(snapshot: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """List the keys of a snapshot with dots (`train.lr`), and their values as in YAML or, for lists, with commas."""
    settings: list[tuple[str, str]] = []
    for key, value in snapshot.items():
        if isinstance(value, Mapping):
            settings += [(f"{key}.{name}", text) for name, text in flatten_settings(value)]
        else:
            settings.append((str(key), _format_value(value)))
    return tuple(settings)


def _format_value(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_format_value, value))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
