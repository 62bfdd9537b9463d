"""Labels as text: missing ones, exact numbers, an order that depends on nothing else, and look-alikes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from decimal import Decimal
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doccls.config.schema import MISSING_LABELS
from doccls.data.labels import find_ambiguous_labels, find_missing_labels, order_classes, parse_decimal

LONG = "880123456789012345"
HOSTILE = (
    "nan", "-nan", "NaN", "inf", "-inf", "1e400", "-1e400", "0", "-0", "1", "1_0", "1_1", "10", "1E1", LONG,
    LONG[:-1] + "6", "0.1", "0.10000000000000000001", "٣", "１", "", " ", "None", "True", "x", "X", "é",
    "e\u0301", "\u200b", "1" * 5000,
)  # fmt: skip


def test_classes_are_sorted_by_number_if_all_are_numbers_else_by_text() -> None:
    assert order_classes(["10", "9", "2", "9"]) == ("2", "9", "10")
    assert order_classes(["1.5", "-3", "+10"]) == ("-3", "1.5", "+10")
    assert order_classes(["10", "9", "b"]) == ("10", "9", "b")
    assert order_classes(["b", "a", "B"]) == ("B", "a", "b")


@pytest.mark.parametrize("labels", [("0_11", "1_1", "1_2", "2_10"), ("1E1", "10", "1E2", "2E1"), ("1", "inf", "2")])
def test_codes_that_are_not_plain_decimals_are_text(labels: tuple[str, ...]) -> None:
    assert order_classes(labels) == tuple(sorted(labels))
    assert find_ambiguous_labels(labels) == []


def test_long_numbers_are_compared_exactly() -> None:
    labels = (LONG, LONG[:-1] + "6", "88012345678901234500", "5", "0." + "3" * 40, "0." + "3" * 39)
    assert order_classes(labels) == (labels[5], labels[4], "5", LONG, labels[1], labels[2])
    assert find_ambiguous_labels(labels) == []
    assert find_ambiguous_labels([LONG, LONG + ".0", "1"]) == [
        f"labels '{LONG}', '{LONG}.0' are the same number, spelled differently"
    ]


@pytest.mark.parametrize(
    ("text", "number"),
    [("1", "1"), ("-1.50", "-1.5"), ("+.5", "0.5"), ("7.", "7"), ("007", "7"), ("1e3", None), ("1_0", None), ("", None)]
    + [(text, None) for text in ("inf", "nan", " 1", "1 ", "٣", "１", "0x1", "1,5", ".", "-", "1.2.3")],
)
def test_plain_decimals_are_numbers(text: str, number: str | None) -> None:
    assert parse_decimal(text) == (None if number is None else Decimal(number))


@given(st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=12, unique=True))
def test_class_order_depends_on_the_set_of_labels_only(labels: list[str]) -> None:
    expected = order_classes(labels)
    assert sorted(expected) == sorted(labels)
    assert all(order_classes(order) == expected for order in list(permutations(labels[:4]))) or len(labels) > 4
    assert order_classes(reversed(labels)) == order_classes(labels * 2) == expected


def test_class_order_is_the_same_under_three_hash_seeds() -> None:
    sets = [
        HOSTILE,
        HOSTILE[:5],
        ("nan", "-nan", "1", "2"),
        ("1", "2", "3"),
        ("1", "1.0", "01"),
        (LONG, LONG[:-1] + "6"),
    ]
    program = (
        "import json, sys; from doccls.data.labels import order_classes, find_missing_labels;"
        "sets = json.load(sys.stdin);"
        "print(json.dumps([[order_classes(labels), sorted(find_missing_labels(labels, ['nan']))] for labels in sets]))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], input=json.dumps(sets), env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout
        for seed in ("0", "1", "2")
    }  # fmt: skip
    assert len(outputs) == 1
    orders = json.loads(outputs.pop())
    assert orders[3][0] == ["1", "2", "3"] and orders[2] == [["-nan", "1", "2", "nan"], ["nan"]]


@given(st.sampled_from([text for text in MISSING_LABELS if text]), st.booleans(), st.booleans())
def test_listed_labels_are_missing_in_any_case(text: str, upper: bool, is_listed: bool) -> None:
    label = text.upper() if upper else text
    assert find_missing_labels([label, "letter"], MISSING_LABELS) == {label}
    assert find_missing_labels([label, "letter"], ["Letter" if is_listed else "?"]) == (
        {"letter"} if is_listed else set()
    )


def test_asterisk_in_missing_labels_stands_for_any_text() -> None:
    labels = ["x1", "X", "y.x", "*", "#a!", "a.c", "abc"]
    assert find_missing_labels(labels, ["x*"]) == {"x1", "X"}
    assert find_missing_labels(labels, ["#*!", "a.c"]) == {"#a!", "a.c"}
    assert find_missing_labels(labels, []) == frozenset()


@pytest.mark.parametrize("label", ["", " ", "\u200b", "\xa0", "\ufeff", "\t", "\u2800", "\ufe0f"])
def test_labels_without_visible_text_are_always_missing(label: str) -> None:
    assert find_missing_labels([label, "x"], []) == {label}


@pytest.mark.parametrize(
    ("one", "other"),
    [("café", "cafe\u0301"), ("A", "\u0410"), ("x", "\u0445"), ("a b", "a\xa0b"), ("a b", "a  b"), ("a\xadb", "ab"),
     ("1\u20132", "1-2"), ("5 µm", "5 μm"), ("ﬁle", "file"), ("❤", "❤\ufe0f"), ("и/о", "и\u2044о"),
     ("а\u0301", "á"), ("it's", "it\u2019s"), ("it's", "it\u00b4s"),
     ("영수증", "\u110b\u1167\u11bc\u1109\u116e\u110c\u1173\u11bc")],
)  # fmt: skip
def test_labels_that_look_the_same_are_ambiguous(one: str, other: str) -> None:
    assert find_ambiguous_labels([one, other, "z"]) == [
        f"labels {one!a}, {other!a} look the same but differ in characters"
    ]


@pytest.mark.parametrize("labels", [("a", "A"), ("x2", "x²"), ("1", "１"), ("l", "I"), ("e", "é"), ("№1", "No1")])
def test_labels_that_look_different_are_not_ambiguous(labels: tuple[str, str]) -> None:
    assert find_ambiguous_labels(labels) == []
