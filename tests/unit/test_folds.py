"""The folds: every row in exactly one, classes spread, groups and duplicates never split, decided by the seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from doccls.data.folds import FoldAssignment, find_units
from doccls.data.folds import assign_folds as assign
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
        targets_N=np.asarray(targets),
        classes=tuple(str(one) for one in range(max(targets) + 1)),
        paths=PackedPaths(Path("/images"), names),
        groups=None if groups is None else PackedTexts(groups),
        folds=None if folds is None else PackedTexts(folds),
        warnings=(),
    )


def assign_folds(
    manifest: Manifest, num_folds: int, stratify: bool, seed: int, contents: dict[int, str] | None = None
) -> FoldAssignment:
    return assign(manifest, find_units(manifest, contents), num_folds, stratify, seed)


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
def test_every_row_is_validated_in_exactly_one_fold(drawn: tuple[list[int], int], stratify: bool, seed: int) -> None:
    targets, num_folds = drawn
    assume(not stratify or max(np.bincount(targets)) >= num_folds)
    check_partition(assign_folds(make_manifest(targets), num_folds, stratify, seed), len(targets))


@given(targets_and_folds, st.integers(0, 2**32 - 1))
def test_stratified_folds_hold_near_equal_numbers_of_each_class(drawn: tuple[list[int], int], seed: int) -> None:
    targets, num_folds = drawn
    assume(max(np.bincount(targets)) >= num_folds)
    assignment = assign_folds(make_manifest(targets), num_folds, True, seed)
    for label in set(targets):
        held = [np.sum(np.asarray(targets)[assignment.list_valid(fold)] == label) for fold in range(num_folds)]
        assert max(held) - min(held) <= 1
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
    assignment = assign_folds(make_manifest(targets, groups), 3, stratify, seed)
    for group in set(groups):
        assert len({fold for fold, one in zip(assignment.fold_of_N, groups, strict=True) if one == group}) == 1


@given(st.lists(st.integers(0, 14), min_size=20, max_size=60), st.booleans(), st.integers(0, 99))
def test_rows_of_one_image_share_a_fold(images: list[int], stratify: bool, seed: int) -> None:
    targets = [image % 2 for image in images]
    distinct = {image: image % 2 for image in images}
    assume(len(distinct) >= 3 and max(np.bincount(list(distinct.values()))) >= 3)
    manifest = make_manifest(targets, images=[f"{image}.jpg" for image in images])
    assignment = assign_folds(manifest, 3, stratify, seed)
    check_partition(assignment, len(images))
    for image in set(images):
        assert len({fold for fold, one in zip(assignment.fold_of_N, images, strict=True) if one == image}) == 1


def test_rows_without_an_image_are_no_duplicates_of_each_other() -> None:
    manifest = make_manifest([0, 1] * 10, images=[None] * 20)
    assert set(assign_folds(manifest, 2, True, 0).fold_of_N) == {0, 1}


def test_groups_of_one_name_that_differ_in_spelling_stay_apart() -> None:
    assignment = assign_folds(make_manifest([0] * 4, ["1", "01", "1.0", "1"]), 3, False, 0)
    assert assignment.fold_of_N[0] == assignment.fold_of_N[3]
    assert set(assignment.fold_of_N) == {0, 1, 2}


def test_a_seed_decides_the_folds_and_another_gives_others() -> None:
    manifest = make_manifest([0, 1, 2] * 20)
    for stratify in (True, False):
        first = assign_folds(manifest, 5, stratify, 7)
        again = assign_folds(manifest, 5, stratify, 7)
        assert again.fold_of_N.tolist() == first.fold_of_N.tolist() and again.digest() == first.digest()
        other = assign_folds(manifest, 5, stratify, 8)
        assert other.fold_of_N.tolist() != first.fold_of_N.tolist() and other.digest() != first.digest()


@pytest.mark.parametrize("stratify", [True, False])
def test_the_seed_decides_grouped_folds_too(stratify: bool) -> None:
    manifest = make_manifest([0, 1] * 30, [f"g{row // 2}" for row in range(60)])
    drawn = [assign_folds(manifest, 3, stratify, seed).digest() for seed in (0, 1, 2, 3, 4, 5, 0)]
    assert drawn[0] == drawn[-1] and len(set(drawn)) > 1


def test_the_digest_follows_every_row() -> None:
    assert FoldAssignment(np.array([0, 1, 0]), 2).digest() != FoldAssignment(np.array([0, 1, 1]), 2).digest()


# --- the CSV's own fold column ---------------------------------------------------------------------------------------


def test_a_fold_column_is_taken_as_it_is() -> None:
    column = ["1", "0", " 2 ", "1", "0"]
    assignment = assign_folds(make_manifest([0, 1, 0, 1, 0], folds=column), 3, True, 0)
    assert assignment.fold_of_N.tolist() == [1, 0, 2, 1, 0]
    other = assign_folds(make_manifest([0, 1, 0, 1, 0], folds=column), 3, False, 99)
    assert other.fold_of_N.tolist() == [1, 0, 2, 1, 0]


@pytest.mark.parametrize("wrong", ["3", "-1", "1.0", "0.0", "", "a", "00", "1e0", "nan", "٢"])
def test_a_fold_that_is_none_is_named_with_its_line(wrong: str) -> None:
    with pytest.raises(UserError) as caught:
        assign_folds(make_manifest([0, 1, 0, 1], folds=["0", "1", wrong, "2"]), 3, True, 0)
    message = str(caught.value)
    assert "not one of 0 to 2 (data.folds = 3): 1\n" in message and f"line 4: {wrong!r}" in message


def test_a_fold_without_rows_is_named() -> None:
    with pytest.raises(UserError, match=r"no row is in fold 1, 3 \(data.folds = 4\)"):
        assign_folds(make_manifest([0, 1, 0], folds=["0", "2", "0"]), 4, True, 0)


def test_an_image_in_two_folds_of_the_column_is_refused() -> None:
    manifest = make_manifest([0, 1, 0], folds=["0", "1", "1"], images=["a.jpg", "b.jpg", "a.jpg"])
    with pytest.raises(UserError, match="lines 2 and 4: IDs 'id0', 'id2'"):
        assign_folds(manifest, 2, True, 0)


def test_a_group_in_two_folds_of_the_column_is_refused() -> None:
    with pytest.raises(UserError, match=r"'g': folds \[0, 1\]"):
        assign_folds(make_manifest([0, 1, 0], ["g", "h", "g"], ["0", "1", "1"]), 2, True, 0)


# --- one content under several names ----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 14), min_size=20, max_size=60), st.booleans(), st.integers(0, 99))
def test_rows_of_one_content_share_a_fold_whatever_their_names(shown: list[int], stratify: bool, seed: int) -> None:
    targets = [content % 2 for content in shown]
    distinct = {content: content % 2 for content in shown}
    assume(len(distinct) >= 3 and max(np.bincount(list(distinct.values()))) >= 3)
    contents = {row: f"digest{content}" for row, content in enumerate(shown)}
    assignment = assign_folds(make_manifest(targets), 3, stratify, seed, contents)
    check_partition(assignment, len(shown))
    for content in set(shown):
        assert len({fold for fold, one in zip(assignment.fold_of_N, shown, strict=True) if one == content}) == 1


@given(
    st.lists(st.tuples(st.integers(0, 24), st.integers(0, 199)), min_size=40, max_size=60),
    st.booleans(),
    st.integers(0, 99),
)
def test_groups_that_share_a_content_are_one(rows: list[tuple[int, int]], stratify: bool, seed: int) -> None:
    groups, shown = [f"g{row[0]}" for row in rows], [row[1] for row in rows]
    contents = {row: str(content) for row, content in enumerate(shown)}
    manifest = make_manifest([0, 1] * (len(rows) // 2) + [0] * (len(rows) % 2), groups)
    units = find_units(manifest, contents)
    assert units.groups is not None
    assume(len(set(units.groups)) >= 3)
    kept = units.first_N == np.arange(len(rows))
    assume(not stratify or max(np.bincount(manifest.targets_N[kept])) >= 3)
    assignment = assign(manifest, units, 3, stratify, seed)
    check_partition(assignment, len(rows))
    for names in (groups, shown):
        for name in set(names):
            assert len({fold for fold, one in zip(assignment.fold_of_N, names, strict=True) if one == name}) == 1


def test_an_image_that_is_listed_under_two_groups_joins_them() -> None:
    images = ["a", "b", "a", "c", "d", "e", "f"]
    manifest = make_manifest([0, 1, 0, 1, 0, 1, 0], ["g", "g", "h", "h", "k", "l", "k"], images=images)
    assert find_units(manifest).groups == ["g", "g", "g", "g", "k", "l", "k"]
    for seed in range(8):
        folds = assign_folds(manifest, 3, False, seed).fold_of_N
        assert len(set(folds[:4])) == 1 and folds[4] == folds[6]
    with pytest.raises(UserError, match=r"more folds than groups in data.group_col \(3; groups that share an image"):
        assign_folds(manifest, 4, False, 0)


def test_a_chain_of_shared_contents_joins_all_its_groups() -> None:
    manifest = make_manifest([0, 1] * 4, list("abbccdde"))
    assert find_units(manifest, {0: "x", 1: "x", 2: "y", 3: "y", 4: "z", 5: "z"}).groups == list("a" * 7 + "e")


def test_a_fold_column_that_tears_one_content_apart_is_refused_with_both_names() -> None:
    manifest = make_manifest([0, 1, 0, 1], folds=["0", "1", "1", "0"])
    with pytest.raises(UserError, match=r"in two folds of the `fold` column: 1\n.*lines 2 and 4: IDs 'id0', 'id2'"):
        assign_folds(manifest, 2, True, 0, {0: "same", 2: "same"})


# --- no fold is empty -------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=3, max_size=9),
    st.integers(2, 6),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_groups_fill_every_fold_where_there_are_enough(
    documents: list[tuple[int, int]], num_folds: int, stratify: bool, seed: int
) -> None:
    """Documents of one class each: there scikit-learn's stratified splitter leaves folds empty."""
    targets = [target for size, target in documents for _ in range(size)]
    groups = [f"doc{number}" for number, (size, _) in enumerate(documents) for _ in range(size)]
    assume(len(documents) >= num_folds and (not stratify or max(np.bincount(targets)) >= num_folds))
    assignment = assign_folds(make_manifest(targets, groups), num_folds, stratify, seed)
    check_partition(assignment, len(targets))
    again = assign_folds(make_manifest(targets, groups), num_folds, stratify, seed)
    assert again.digest() == assignment.digest()
    for group in set(groups):
        assert len({fold for fold, one in zip(assignment.fold_of_N, groups, strict=True) if one == group}) == 1


# --- too few ---------------------------------------------------------------------------------------------------------


def test_more_folds_than_images_is_refused() -> None:
    with pytest.raises(UserError, match=r"more folds than images \(3\)"):
        assign_folds(make_manifest([0, 1, 0]), 4, False, 0)
    with pytest.raises(UserError, match=r"more folds than images \(2\)"):
        assign_folds(make_manifest([0, 1, 0], images=["a.jpg", "b.jpg", "a.jpg"]), 3, False, 0)


def test_more_folds_than_groups_is_refused() -> None:
    with pytest.raises(UserError, match=r"more folds than groups in data.group_col \(2;"):
        assign_folds(make_manifest([0, 1] * 3, ["a", "b"] * 3), 3, False, 0)


def test_stratifying_classes_that_are_all_too_small_is_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"the largest has 2.*data.stratify: false"):
        assign_folds(make_manifest([0, 0, 1, 1, 2, 2]), 3, True, 0)


def test_a_class_smaller_than_the_folds_is_split_all_the_same() -> None:
    check_partition(assign_folds(make_manifest([0] * 10 + [1] * 2), 5, True, 0), 12)
