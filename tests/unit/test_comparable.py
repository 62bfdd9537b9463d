"""Which runs have the same rows and damaged copies."""

from __future__ import annotations

import pytest

from doccls.oof.comparable import Damage, find_damage_problem


@pytest.mark.parametrize(
    ("levels", "versions", "problem"),
    [
        (("scan", "scan"), ("1", "1"), None),
        ((None, None), ("1", "2"), None),
        (("scan", "scan"), ("1", None), None),
        (("scan", None), ("1", "1"), "only some of the runs were validated on damaged copies"),
        (("scan", "light"), ("1", "1"), "differently damaged copies of their pages (valid.damage: x: scan, y: light)"),
        (("scan", "scan"), ("1", "2"), "different versions of doccls damaged (damage_version in config.yaml: x: 1"),
    ],
)
def test_damaged_copies_are_the_same(
    levels: tuple[str | None, ...], versions: tuple[str | None, ...], problem: str | None
) -> None:
    found = find_damage_problem(
        [Damage(name, level, version) for name, level, version in zip("xy", levels, versions, strict=True)]
    )
    assert found is None if problem is None else found is not None and problem in found
