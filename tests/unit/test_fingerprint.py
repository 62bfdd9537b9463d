"""The fingerprint changes with every key that changes results, and with no other key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from doccls.config import Config, schema
from doccls.config.load import operational_keys
from doccls.config.schema import SECTIONS
from doccls.errors import UserError
from doccls.run.fingerprint import (
    check_snapshot,
    claim_precision,
    derive_fingerprint,
    digest_file,
    digest_json,
    find_fingerprint,
)
from doccls.run.paths import RunPaths

MakeConfig = Callable[..., Config]

# Repeated here to detect a key that is marked operational by mistake.
OPERATIONAL = {
    ("mode",), ("data",), ("tracking",), ("output",), ("provenance",), ("model", "weights"),
    ("train", "micro_batch_size"), ("train", "num_processes"), ("train", "log_interval"),
    ("train", "collective_timeout_s"), ("train", "stop_timeout_s"), ("train", "sigusr2"),
    ("train", "checkpoint_interval_s"),
    ("project", "name"), ("project", "version"),
}  # fmt: skip

EVERY = [(section, key) for section, model in SECTIONS.items() for key in model.model_fields]
CANDIDATES: tuple[Any, ...] = (
    True, False, 0.25, 0.5, 1, 2, 7, 40, "x9", "poly", "fp16", ".png", (0.1, 0.2, 0.3), "all", 1e-5, "error", "skip",
    "stop", 512, "linear", "fast", "auto", ("?",), "scan", "clean",
)  # fmt: skip


def identify(config: Config, data: str = "d", folds: str = "f", weights: str | None = None) -> str:
    return derive_fingerprint(config, data, folds, weights)


def change(make_config: MakeConfig, section: str, key: str) -> Config:
    """Return a valid config in which only this key has another value."""
    base = make_config(train={"epochs": 50})
    for value in CANDIDATES:
        if value == getattr(getattr(base, section), key):
            continue
        sections: dict[str, dict[str, Any]] = {"train": {"epochs": 50}}
        sections.setdefault(section, {})[key] = value
        try:
            changed = make_config(**sections)
        except ValidationError:
            continue
        if changed != base:
            return changed
    raise AssertionError(f"no other value for {section}.{key} among the candidates: add one")


def test_operational_keys() -> None:
    assert operational_keys() == OPERATIONAL


@pytest.mark.parametrize(("section", "key"), EVERY)
def test_key_changes_fingerprint_unless_operational(make_config: MakeConfig, section: str, key: str) -> None:
    before = identify(make_config(train={"epochs": 50}))
    unchanged = identify(change(make_config, section, key)) == before
    assert unchanged == bool({(section,), (section, key)} & OPERATIONAL)


def test_mode_and_provenance_do_not_change_fingerprint(make_config: MakeConfig) -> None:
    assert identify(make_config(mode="highperf", provenance={"a": 1})) == identify(make_config())


def test_data_folds_and_weights_change_fingerprint_and_are_not_confused(make_config: MakeConfig) -> None:
    config = make_config()
    found = [
        identify(config), identify(config, data="x"), identify(config, folds="x"), identify(config, weights="x"),
        identify(config, "f", "d"), identify(config, weights=""),
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert identify(config) == found[0] and len(found[0]) == 64


def test_version_of_damage_changes_fingerprint_of_runs_with_damaged_pages(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, validated = make_config(augment={"rotate_deg": 5}), make_config(valid={"damage": "light"})
    keys = ("damage_prob", "blur_prob", "noise_prob", "shadow_prob", "jpeg_prob")
    trained = [make_config(augment={key: 0.1}) for key in keys]
    before = [identify(config) for config in (plain, validated, *trained)]
    monkeypatch.setattr(schema, "DAMAGE_VERSION", schema.DAMAGE_VERSION + 1)
    after = [identify(config) for config in (plain, validated, *trained)]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, *[False] * 6]


def test_path_of_weights_does_not_change_fingerprint(make_config: MakeConfig) -> None:
    first, second = (make_config(model={"weights": name}) for name in ("a.pth", "b.pth"))
    assert identify(first, weights="w") == identify(second, weights="w")


def test_path_of_model_folder_does_not_change_fingerprint(make_config: MakeConfig) -> None:
    """Its content is in the digest of the weights."""
    here, there = (make_config(model={"name": f"local-dir:/{folder}/m"}) for folder in ("a", "b"))
    assert identify(here, weights="w") == identify(there, weights="w") != identify(here, weights="v")
    assert identify(here, weights="w") != identify(make_config(model={"name": "test_vit"}), weights="w")


def test_json_digest_ignores_order_of_keys() -> None:
    assert digest_json({"a": 1, "b": [1, 2]}) == digest_json({"b": [1, 2], "a": 1})
    assert digest_json({"a": [1, 2]}) != digest_json({"a": [2, 1]})


def test_file_digest_is_sha256_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"abc" * 10**5)
    assert digest_file(tmp_path / "w") == hashlib.sha256(b"abc" * 10**5).hexdigest()


@pytest.mark.parametrize("name", ["gone.pth", "."])
def test_unreadable_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        digest_file(tmp_path / name)
    assert str(tmp_path) in str(caught.value)


def test_run_is_joined_only_with_its_own_fingerprint(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    check_snapshot(paths, "a" * 64)  # no snapshot yet
    paths.snapshot.write_text(f"provenance: {{fingerprint: {'a' * 64}, data_digest: d, folds_digest: f}}\n")
    check_snapshot(paths, "a" * 64)
    with pytest.raises(UserError, match=r"aaaaaaaaaaaa, now bbbbbbbbbbbb\): choose another --run-id"):
        check_snapshot(paths, "b" * 64)


@pytest.mark.parametrize(
    "text", ["model: {}\n", "provenance: {fingerprint: a}\n", "provenance: 3\n", "", "provenance: {fingerprint: [\n"]
)
def test_damaged_snapshot_is_rejected_and_not_treated_as_missing(
    tmp_path: Path, make_config: MakeConfig, text: str
) -> None:
    paths = RunPaths(tmp_path)
    paths.snapshot.write_text(text)
    for check in (lambda: check_snapshot(paths, "a" * 64), lambda: find_fingerprint(paths, make_config())):
        with pytest.raises(UserError, match="not a snapshot of a run"):
            check()


def test_snapshot_of_an_earlier_version_is_rejected_by_name(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.snapshot.write_text(f"provenance: {{identity: {'a' * 64}, data_digest: d, folds_digest: f}}\n")
    with pytest.raises(UserError, match=r"written by an earlier version of doccls: continue run .* with that version"):
        check_snapshot(paths, "a" * 64)


def test_fingerprint_is_found_from_snapshot_alone(tmp_path: Path, make_config: MakeConfig) -> None:
    paths = RunPaths(tmp_path)
    assert find_fingerprint(paths, make_config()) is None
    (tmp_path / "w.pth").write_bytes(b"weights")
    plain, loaded = make_config(), make_config(model={"weights": "w.pth"})
    for config, weights in ((plain, None), (loaded, digest_file(tmp_path / "w.pth"))):
        fingerprint = derive_fingerprint(config, "d", "f", weights)
        paths.snapshot.write_text(f"provenance: {{fingerprint: {fingerprint}, data_digest: d, folds_digest: f}}\n")
        assert find_fingerprint(paths, config) == fingerprint


def test_incompatible_config_is_rejected_before_data_is_read(tmp_path: Path, make_config: MakeConfig) -> None:
    paths = RunPaths(tmp_path)
    (tmp_path / "w.pth").write_bytes(b"weights")
    fingerprint = derive_fingerprint(make_config(), "d", "f", None)
    paths.snapshot.write_text(f"provenance: {{fingerprint: {fingerprint}, data_digest: d, folds_digest: f}}\n")
    assert find_fingerprint(paths, make_config(data={"num_workers": 1})) == fingerprint  # operational
    for other in (make_config(train={"lr": 0.5}), make_config(model={"weights": "w.pth"})):
        with pytest.raises(UserError, match="choose another --run-id"):
            find_fingerprint(paths, other)


def test_first_training_process_sets_the_precision(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "r")
    paths.root.mkdir()
    claim_precision(paths, "bf16")
    claim_precision(paths, "bf16")
    with pytest.raises(UserError, match=r"trained in precision 'bf16' \(.*\), and .* in 'no'.* Set train\.amp to bf16"):
        claim_precision(paths, "no")
    assert [file.name for file in paths.root.iterdir()] == [paths.precision.name]
    paths.precision.write_text("no\n")
    with pytest.raises(UserError, match=r"Set train\.amp to false"):
        claim_precision(paths, "fp16")


@pytest.mark.parametrize("earlier", [None, "a file that a killed process has just created"])
def test_of_processes_that_set_the_precision_at_once_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: str | None
) -> None:
    monkeypatch.setattr("doccls.system.lock._POLL_S", 0.01)
    paths = RunPaths(tmp_path / "r")
    paths.root.mkdir()
    if earlier is not None:
        (paths.root / ".precision.txt.0123abcd.tmp").write_text(earlier)

    def claim(precision: str) -> str:
        try:
            claim_precision(paths, precision)
        except UserError as error:
            return str(error)
        return precision

    precisions = ["no", "fp16", "bf16"] * 2
    with ThreadPoolExecutor(len(precisions)) as pool:
        results = list(pool.map(claim, precisions))
    claimed = paths.precision.read_text().strip()
    assert [result for result in results if result in precisions] == [claimed] * 2
    assert sum(f"is trained in precision {claimed!r}" in result for result in results) == 4
