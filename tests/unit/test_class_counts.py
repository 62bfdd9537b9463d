"""Class counts as log lines."""

from __future__ import annotations

import numpy as np

from doccls.data.class_counts import render_counts


def test_long_names_are_cut() -> None:
    lines = render_counts(["a", "b" * 5000], np.array([[1, 12], [3, 4]]))
    assert lines == [f"a{' ' * 62} :  1 12", f"{'b' * 60}... :  3  4"]


def test_many_classes_are_counted_but_not_shown() -> None:
    lines = render_counts([str(label) for label in range(203)], np.ones((203, 2), dtype=np.int64))
    assert len(lines) == 201 and lines[-1] == "... and 3 more classes"
