"""Fold assignment: a partition of the rows, stratified, seeded, and with groups and duplicates never split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from doccls.data.folds import FoldAssignment, assign_folds, find_units
from doccls.data.manifest import Manifest
from doccls.data.packed import PackedPaths, PackedTexts
from doccls.errors import UserError


def make_manifest(
    targets: Sequence[int],
    groups: Sequence[str] | None = None,
    folds: Sequence[str] | None = None,
    images: Sequence[str | None] | None = None,
) -> Manifest:
    count = len(targets)
    names = [f"{row}.jpg" for row in range(count)] if images is None else images
    return Manifest(
        ids=PackedTexts(f"id{row}" for row in range(count)),
        lines_N=np.arange(2, count + 2),
        targets_N=np.asarray(targets),
        classes=tuple(str(label) for label in range(max(targets) + 1)),
        paths=PackedPaths(Path("/images"), names),
        groups=None if groups is None else PackedTexts(groups),
        folds=None if folds is None else PackedTexts(folds),
        warnings=(),
    )


def assign(
    manifest: Manifest, num_folds: int, stratify: bool, seed: int, contents: dict[int, str] | None = None
) -> FoldAssignment:
    return assign_folds(manifest, find_units(manifest, contents), num_folds, stratify, seed)


def check_not_split(assignment: FoldAssignment, keys: Sequence[object]) -> None:
    fold_of: dict[object, set[int]] = {}
    for fold, key in zip(assignment.fold_of_N.tolist(), keys, strict=True):
        fold_of.setdefault(key, set()).add(fold)
    assert all(len(folds) == 1 for folds in fold_of.values())


targets_and_folds = st.tuples(st.lists(st.integers(0, 4), min_size=12, max_size=80), st.integers(2, 5))


def check_partition(assignment: FoldAssignment, count: int) -> None:
    valid = [assignment.list_valid(fold) for fold in range(assignment.num_folds)]
    assert sorted(np.concatenate(valid)) == list(range(count))
    assert all(len(rows) > 0 for rows in valid)
    for fold, rows in enumerate(valid):
        train = assignment.list_train(fold)
        assert sorted([*rows, *train]) == list(range(count))
        assert list(train) == sorted(train) and list(rows) == sorted(rows)
        assert train.dtype == rows.dtype == np.int64
    assert assignment.count() == {fold: len(rows) for fold, rows in enumerate(valid)}


@given(targets_and_folds, st.booleans(), st.integers(0, 2**32 - 1))
def test_folds_are_a_partition_of_the_rows(drawn: tuple[list[int], int], stratify: bool, seed: int) -> None:
    targets, num_folds = drawn
    assume(not stratify or max(np.bincount(targets)) >= num_folds)
    check_partition(assign(make_manifest(targets), num_folds, stratify, seed), len(targets))


@given(targets_and_folds, st.integers(0, 2**32 - 1))
def test_stratified_folds_have_near_equal_class_counts(drawn: tuple[list[int], int], seed: int) -> None:
    targets, num_folds = drawn
    assume(max(np.bincount(targets)) >= num_folds)
    assignment = assign(make_manifest(targets), num_folds, True, seed)
    for label in set(targets):
        counts = [np.sum(np.asarray(targets)[assignment.list_valid(fold)] == label) for fold in range(num_folds)]
        assert max(counts) - min(counts) <= 1
    sizes = list(assignment.count().values())
    assert max(sizes) - min(sizes) <= len(set(targets))


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=30, max_size=60),
    st.booleans(),
    st.integers(0, 99),
)
def test_groups_are_never_split(rows: list[tuple[int, int]], stratify: bool, seed: int) -> None:
    targets, groups = [row[0] for row in rows], [f"g{row[1]}" for row in rows]
    assume(len(set(groups)) >= 3 and max(np.bincount(targets)) >= 3)
    assignment = assign(make_manifest(targets, groups), 3, stratify, seed)
    check_not_split(assignment, groups)


@given(st.lists(st.integers(0, 14), min_size=20, max_size=60), st.booleans(), st.integers(0, 99))
def test_rows_of_one_image_share_a_fold(images: list[int], stratify: bool, seed: int) -> None:
    targets = [image % 2 for image in images]
    distinct = {image: image % 2 for image in images}
    assume(len(distinct) >= 3 and max(np.bincount(list(distinct.values()))) >= 3)
    manifest = make_manifest(targets, images=[f"{image}.jpg" for image in images])
    assignment = assign(manifest, 3, stratify, seed)
    check_partition(assignment, len(images))
    check_not_split(assignment, images)


def test_rows_without_image_are_not_duplicates_of_each_other() -> None:
    manifest = make_manifest([0, 1] * 10, images=[None] * 20)
    assert set(assign(manifest, 2, True, 0).fold_of_N) == {0, 1}


def test_group_names_are_compared_as_text() -> None:
    assignment = assign(make_manifest([0] * 4, ["1", "01", "1.0", "1"]), 3, False, 0)
    assert assignment.fold_of_N[0] == assignment.fold_of_N[3]
    assert set(assignment.fold_of_N) == {0, 1, 2}


def test_seed_determines_the_folds() -> None:
    manifest = make_manifest([0, 1, 2] * 20)
    for stratify in (True, False):
        first = assign(manifest, 5, stratify, 7)
        second = assign(manifest, 5, stratify, 7)
        assert second.fold_of_N.tolist() == first.fold_of_N.tolist() and second.digest() == first.digest()
        other = assign(manifest, 5, stratify, 8)
        assert other.fold_of_N.tolist() != first.fold_of_N.tolist() and other.digest() != first.digest()


@pytest.mark.parametrize("stratify", [True, False])
def test_seed_determines_grouped_folds(stratify: bool) -> None:
    manifest = make_manifest([0, 1] * 30, [f"g{row // 2}" for row in range(60)])
    digests = [assign(manifest, 3, stratify, seed).digest() for seed in (0, 1, 2, 3, 4, 5, 0)]
    assert digests[0] == digests[-1] and len(set(digests)) > 1


def test_digest_depends_on_every_row() -> None:
    assert FoldAssignment(np.array([0, 1, 0]), 2).digest() != FoldAssignment(np.array([0, 1, 1]), 2).digest()


# --- the CSV's own fold column ---------------------------------------------------------------------------------------


def test_fold_column_is_used_unchanged() -> None:
    column = ["1", "00", " 2.0 ", "1.", "0.0"]
    assignment = assign(make_manifest([0, 1, 0, 1, 0], folds=column), 3, True, 0)
    assert assignment.fold_of_N.tolist() == [1, 0, 2, 1, 0]
    other = assign(make_manifest([0, 1, 0, 1, 0], folds=column), 3, False, 99)
    assert other.fold_of_N.tolist() == [1, 0, 2, 1, 0]


@pytest.mark.parametrize("wrong", ["3", "-1", "1.5", "0.00000000000000001", "", "a", "1e0", "nan", "-nan", "٢", "1_0"])
def test_invalid_fold_is_reported_by_line(wrong: str) -> None:
    with pytest.raises(UserError) as caught:
        assign(make_manifest([0, 1, 0, 1], folds=["0", "1", wrong, "2"]), 3, True, 0)
    message = str(caught.value)
    assert "not one of 0 to 2 (data.folds = 3): 1\n" in message and f"line 4: {wrong!r}" in message


def test_fold_without_rows_is_reported() -> None:
    with pytest.raises(UserError, match=r"no row is in fold 1, 3 \(data.folds = 4\)"):
        assign(make_manifest([0, 1, 0], folds=["0", "2", "0"]), 4, True, 0)


def test_fold_column_that_splits_an_image_is_rejected() -> None:
    manifest = make_manifest([0, 1, 0], folds=["0", "1", "1"], images=["a.jpg", "b.jpg", "a.jpg"])
    with pytest.raises(UserError) as caught:
        assign(manifest, 2, True, 0)
    message = str(caught.value)
    assert "images in two folds of the `fold` column: 1\n    lines 2 and 4: IDs 'id0', 'id2', folds [0, 1]\n" in message
    assert "data.on_duplicate: allow keeps it" in message


def test_image_in_three_rows_is_one_split_image() -> None:
    manifest = make_manifest([0, 1, 0, 1], folds=["0", "1", "1", "0"], images=["a.jpg", "a.jpg", "a.jpg", "c.jpg"])
    with pytest.raises(UserError, match=r"column: 1\n    lines 2 and 3 and 4: .*, folds \[0, 1, 1\]\n"):
        assign(manifest, 2, True, 0)


def test_fold_column_may_split_an_image_if_allowed() -> None:
    manifest = make_manifest([0, 1, 0, 1], folds=["0", "1", "1", "0"], images=["a.jpg", "b.jpg", "a.jpg", "c.jpg"])
    assignment = assign_folds(manifest, find_units(manifest), 2, True, 0, allow_split=True)
    assert assignment.fold_of_N.tolist() == [0, 1, 1, 0] and assignment.split == {0, 2}
    assert assign(make_manifest([0, 1], folds=["0", "1"]), 2, True, 0).split == frozenset()


def test_fold_column_that_splits_a_group_is_rejected() -> None:
    with pytest.raises(UserError, match=r"'g': folds \[0, 1\]"):
        assign(make_manifest([0, 1, 0], ["g", "h", "g"], ["0", "1", "1"]), 2, True, 0)


# --- duplicate images under different names ---------------------------------------------------------------------------


@given(st.lists(st.integers(0, 14), min_size=20, max_size=60), st.booleans(), st.integers(0, 99))
def test_rows_with_the_same_content_share_a_fold(shown: list[int], stratify: bool, seed: int) -> None:
    targets = [content % 2 for content in shown]
    distinct = {content: content % 2 for content in shown}
    assume(len(distinct) >= 3 and max(np.bincount(list(distinct.values()))) >= 3)
    contents = {row: f"digest{content}" for row, content in enumerate(shown)}
    assignment = assign(make_manifest(targets), 3, stratify, seed, contents)
    check_partition(assignment, len(shown))
    check_not_split(assignment, shown)


@given(
    st.lists(st.tuples(st.integers(0, 24), st.integers(0, 199)), min_size=40, max_size=60),
    st.booleans(),
    st.integers(0, 99),
)
def test_groups_that_share_content_are_merged(rows: list[tuple[int, int]], stratify: bool, seed: int) -> None:
    groups, shown = [f"g{row[0]}" for row in rows], [row[1] for row in rows]
    contents = {row: str(content) for row, content in enumerate(shown)}
    manifest = make_manifest([0, 1] * (len(rows) // 2) + [0] * (len(rows) % 2), groups)
    units = find_units(manifest, contents)
    assert units.groups is not None
    assume(len(set(units.groups)) >= 3)
    kept = units.first_N == np.arange(len(rows))
    assume(not stratify or max(np.bincount(manifest.targets_N[kept])) >= 3)
    assignment = assign_folds(manifest, units, 3, stratify, seed)
    check_partition(assignment, len(rows))
    check_not_split(assignment, groups)
    check_not_split(assignment, shown)


def test_image_listed_in_two_groups_merges_them() -> None:
    images = ["a", "b", "a", "c", "d", "e", "f"]
    manifest = make_manifest([0, 1, 0, 1, 0, 1, 0], ["g", "g", "h", "h", "k", "l", "k"], images=images)
    assert find_units(manifest).groups == ["g", "g", "g", "g", "k", "l", "k"]
    for seed in range(8):
        folds = assign(manifest, 3, False, seed).fold_of_N
        assert len(set(folds[:4])) == 1 and folds[4] == folds[6]
    with pytest.raises(UserError, match=r"more folds than groups in data.group_col \(3; groups that share an image"):
        assign(manifest, 4, False, 0)


def test_chain_of_shared_contents_merges_all_its_groups() -> None:
    manifest = make_manifest([0, 1] * 4, list("abbccdde"))
    assert find_units(manifest, {0: "x", 1: "x", 2: "y", 3: "y", 4: "z", 5: "z"}).groups == list("a" * 7 + "e")


def test_fold_column_that_splits_duplicates_is_rejected_with_both_ids() -> None:
    manifest = make_manifest([0, 1, 0, 1], folds=["0", "1", "1", "0"])
    with pytest.raises(UserError, match=r"in two folds of the `fold` column: 1\n.*lines 2 and 4: IDs 'id0', 'id2'"):
        assign(manifest, 2, True, 0, {0: "same", 2: "same"})


# --- no fold is empty -------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=3, max_size=9),
    st.integers(2, 6),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_no_fold_is_empty_if_there_are_enough_groups(
    documents: list[tuple[int, int]], num_folds: int, stratify: bool, seed: int
) -> None:
    """With documents of one class each, scikit-learn's StratifiedGroupKFold leaves folds empty."""
    targets = [target for size, target in documents for _ in range(size)]
    groups = [f"doc{number}" for number, (size, _) in enumerate(documents) for _ in range(size)]
    assume(len(documents) >= num_folds and (not stratify or max(np.bincount(targets)) >= num_folds))
    assignment = assign(make_manifest(targets, groups), num_folds, stratify, seed)
    check_partition(assignment, len(targets))
    repeated = assign(make_manifest(targets, groups), num_folds, stratify, seed)
    assert repeated.digest() == assignment.digest()
    check_not_split(assignment, groups)


# --- too few ---------------------------------------------------------------------------------------------------------


def test_more_folds_than_images_is_rejected() -> None:
    with pytest.raises(UserError, match=r"more folds than images \(3\)"):
        assign(make_manifest([0, 1, 0]), 4, False, 0)
    with pytest.raises(UserError, match=r"more folds than images \(2\)"):
        assign(make_manifest([0, 1, 0], images=["a.jpg", "b.jpg", "a.jpg"]), 3, False, 0)


def test_more_folds_than_groups_is_rejected() -> None:
    with pytest.raises(UserError, match=r"more folds than groups in data.group_col \(2;"):
        assign(make_manifest([0, 1] * 3, ["a", "b"] * 3), 3, False, 0)


def test_stratifying_only_small_classes_is_rejected_with_alternatives() -> None:
    with pytest.raises(UserError, match=r"the largest has 2.*data.stratify: false"):
        assign(make_manifest([0, 0, 1, 1, 2, 2]), 3, True, 0)


def test_class_with_fewer_samples_than_folds_is_split() -> None:
    check_partition(assign(make_manifest([0] * 10 + [1] * 2), 5, True, 0), 12)
