"""The fingerprint of a run: a digest that folds, checkpoints and fold predictions of the same run share."""

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from doccls.config.load import operational_keys
from doccls.config.local_model import CONFIG_FILE, PREFIX, find_local_folder, find_local_weights
from doccls.config.paths import describe_error, is_file
from doccls.config.schema import Config, ModelConfig
from doccls.config.snapshot import SnapshotLoader
from doccls.errors import UserError
from doccls.run.paths import RunPaths
from doccls.system.atomic_files import read_text, write_text
from doccls.system.lock import hold_lock

_CLAIM_S = 60.0  # how long to wait for a process that sets the precision, which takes a moment
_FIRST_DAMAGE_VERSION = 1  # of all runs from before snapshots recorded it


def derive_fingerprint(config: Config, data_digest: str, folds_digest: str, weights_digest: str | None) -> str:
    """Return the SHA-256 of the config keys that change results, the data, the folds and the initial weights.

    With damaged pages, it also covers the version of the damage.
    """
    recipe = config.model_dump(mode="json")
    for section, *key in operational_keys():
        if key:
            del recipe[section][key[0]]
        else:
            del recipe[section]
    if find_local_folder(config.model.name) is not None:
        recipe["model"]["name"] = PREFIX  # its content is in `weights_digest`, so that the folder can be moved
    parts: dict[str, Any] = {"recipe": recipe, "data": data_digest, "folds": folds_digest, "weights": weights_digest}
    if config.damage_version is not None:
        parts["damage"] = config.damage_version
    return digest_json(parts)


def digest_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes.

    Raises:
        UserError: the file can't be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} (paths in a config are relative to the config file)") from error


def digest_weights(model: ModelConfig) -> str | None:
    """Return the SHA-256 of the files that the initial model is read from, or None if there are none.

    Raises:
        UserError: a file is missing or can't be read.
    """
    folder = find_local_folder(model.name)
    if folder is None:
        return digest_file(model.weights) if model.weights else None
    weights = model.weights or (find_local_weights(folder) if model.pretrained else None)
    return digest_json([digest_file(path) for path in (folder / CONFIG_FILE, weights) if path is not None])


def check_snapshot(paths: RunPaths, fingerprint: str) -> None:
    """Check that the run was started with this fingerprint; a run without a snapshot passes.

    Raises:
        UserError: the run was started with another fingerprint.
    """
    provenance = read_provenance(paths)
    if provenance is not None and provenance["fingerprint"] != fingerprint:
        raise UserError(_format_difference(paths, provenance["fingerprint"], fingerprint))


def claim_precision(paths: RunPaths, precision: str) -> None:
    """Set the precision of the run unless an earlier process has set it; all folds train in the same precision.

    `derive_fingerprint` excludes the precision, since the launching process may not know the machines that train.
    The first process is found by a lock, which works on all file systems: a hard link, which would never replace a
    file either, does not, and a file created as new is incomplete for a moment, or for good if the process is killed.

    Raises:
        UserError: the run uses another precision.
        OSError: no disk space, no permission, ...
    """
    if not is_file(paths.precision):
        with hold_lock(paths.precision_lock, f"the precision of run {paths.run_id} is being set", _CLAIM_S):
            if not is_file(paths.precision):
                write_text(paths.precision, f"{precision}\n")
    claimed = paths.precision.read_text(encoding="utf-8").strip()
    if claimed != precision:
        setting = {"no": "false"}.get(claimed, claimed)
        raise UserError(
            f"run {paths.run_id} is trained in precision {claimed!r} ({paths.precision}), and this process would "
            f"train in {precision!r}: its folds would not be comparable. Set train.amp to {setting}, or choose "
            "another --run-id"
        )


def find_fingerprint(paths: RunPaths, config: Config) -> str | None:
    """Return the fingerprint of the run, or None without a snapshot; check that `config` matches it, without the data.

    Raises:
        UserError: the config differs from the run's in a key that changes results, or in its weights.
    """
    provenance = read_provenance(paths)
    if provenance is None:
        return None
    weights = digest_weights(config.model)
    fingerprint = derive_fingerprint(config, provenance["data_digest"], provenance["folds_digest"], weights)
    if fingerprint != provenance["fingerprint"]:
        raise UserError(_format_difference(paths, provenance["fingerprint"], fingerprint))
    return fingerprint


def read_provenance(paths: RunPaths) -> dict[str, str] | None:
    """Return the run's fingerprint, data_digest, folds_digest and damage_version by its snapshot; None without one.

    Raises:
        UserError: the snapshot can't be read, is damaged, or is of an earlier version.
    """
    try:
        text = read_text(paths.snapshot)
        provenance = yaml.load(text, SnapshotLoader)["provenance"]  # noqa: S506 (a safe loader)
        if "fingerprint" not in provenance and "identity" in provenance:  # its former name
            raise UserError(
                f"{paths.snapshot}: written by an earlier version of doccls: continue run {paths.run_id} with that "
                "version, or choose another --run-id"
            )
        found = {name: str(provenance[name]) for name in ("fingerprint", "data_digest", "folds_digest")}
        return found | {"damage_version": str(provenance.get("damage_version", _FIRST_DAMAGE_VERSION))}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(describe_error(error, paths.snapshot, "file")) from error
    except (UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{paths.snapshot}: damaged, or not a snapshot of a run: choose another --run-id") from error


def _format_difference(paths: RunPaths, found: str, fingerprint: str) -> str:
    return (
        f"run {paths.run_id} in {paths.root} was started with another config, data, folds or weights "
        f"(fingerprint {found[:12]}, now {fingerprint[:12]}): choose another --run-id"
    )
