"""Labels as text: which are missing, which are numbers, their order, and labels that could be taken for one another."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal

_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
# Error values of spreadsheets in any language (#WERT!, #¿NOMBRE?, Err:502), and C's spellings of a missing number.
_ERROR_VALUE = re.compile(r"#.*[!?]|#n/?[a-z]|err:[0-9]{3}|[+-]?1\.#[a-z]+|[+-]?nan(?:\(.*\))?", re.IGNORECASE)
# Letters, dashes and quotation marks that most fonts draw like the ASCII character below them.
_CONFUSABLE = str.maketrans(
    "АВЕЅІЈКМНОРСТХаеѕіјорсухΑΒΕΖΗΙΚΜΝΟΡΤΥΧο\u2010\u2011\u2012\u2013\u2212\u2018\u2019\u201c\u201d",
    "ABESIJKMHOPCTXaesijopcyxABEZHIKMNOPTYXo-----''\"\"",
)


def parse_decimal(text: str) -> Decimal | None:
    """Return the exact number that a plain decimal such as `-1.50` writes, at any length; None for other text.

    `1e3`, `1_000`, `inf` and digits of other scripts are text.
    """
    return Decimal(text) if _DECIMAL.fullmatch(text) else None


def find_missing_labels(labels: Iterable[str], missing_labels: Iterable[str]) -> frozenset[str]:
    """Return the distinct labels that count as missing: those listed, in any case, and those without visible text."""
    listed = {text.strip().casefold() for text in missing_labels}
    return frozenset(label for label in set(labels) if label.casefold() in listed or not _reduce_to_shape(label))


def order_classes(labels: Iterable[str]) -> tuple[str, ...]:
    """Sort the distinct labels, by number if all are plain decimals, else by text."""
    number_of = {label: parse_decimal(label) for label in set(labels)}
    numbers = [(number, label) for label, number in number_of.items() if number is not None]
    return tuple(label for _, label in sorted(numbers)) if len(numbers) == len(number_of) else tuple(sorted(number_of))


def find_ambiguous_labels(classes: Sequence[str]) -> list[str]:
    """Describe each set of classes that a reader would take for one: the same number, or text that looks the same."""
    numbers: dict[Decimal | None, list[str]] = {}
    shapes: dict[str, list[str]] = {}
    for label in classes:
        numbers.setdefault(parse_decimal(label), []).append(label)
        shapes.setdefault(_reduce_to_shape(label), []).append(label)
    spellings = [] if None in numbers else [same for same in numbers.values() if len(same) > 1]
    lookalikes = [same for same in shapes.values() if len(same) > 1]
    return [
        *(f"labels {', '.join(map(repr, same))} are the same number, spelled differently" for same in spellings),
        *(f"labels {', '.join(map(ascii, same))} look the same but differ in characters" for same in lookalikes),
    ]


def find_error_values(counts: Mapping[str, int]) -> list[str]:
    """Return the labels that look like an error value or a missing number, each with its count of rows."""
    return [f"{label!r} ({count})" for label, count in counts.items() if _ERROR_VALUE.fullmatch(label)]


def _reduce_to_shape(label: str) -> str:
    """Return a form that is the same for labels that look the same: composed, without invisible characters."""
    visible = (
        " " if character.isspace() else character
        for character in unicodedata.normalize("NFC", label)
        if unicodedata.category(character) not in ("Cf", "Cc") or character.isspace()
    )
    return " ".join("".join(visible).translate(_CONFUSABLE).split())
