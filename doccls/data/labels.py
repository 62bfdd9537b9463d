"""Labels as text: which are missing, which are numbers, their order, and labels that could be taken for one another."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from decimal import Decimal

_DECIMAL = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
# Letters and marks that most fonts draw like the ASCII character below them.
_CONFUSABLE = str.maketrans(
    "АВЕЅІЈКМНОРСТУХаеѕіјорсухΑΒΕΖΗΙΚΜΝΟΡΤΥΧο\u2010\u2011\u2012\u2013\u2212\u2018\u2019\u2032\u02bc\u00b4\u201c\u201d\u2044\u2215",
    "ABESIJKMHOPCTYXaesijopcyxABEZHIKMNOPTYXo-----'''''\"\"//",
)
# Characters without ink in other categories than Cc and Cf: variation selectors, joiners, fillers, the blank Braille.
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u2800\u3164\ufe00-\ufe0f\uffa0]")


def parse_decimal(text: str) -> Decimal | None:
    """Return the exact number that a plain decimal such as `-1.50` writes, at any length; None for other text.

    `1e3`, `1_000`, `inf` and digits of other scripts are text.
    """
    return Decimal(text) if _DECIMAL.fullmatch(text) else None


def find_missing_labels(labels: Iterable[str], missing_labels: Iterable[str]) -> frozenset[str]:
    """Return the distinct labels that count as missing: those without visible text, and those listed, in any case.

    In the list, `*` stands for any text.
    """
    patterns = (re.escape(text.strip().casefold()).replace(r"\*", ".*") for text in missing_labels)
    listed = re.compile("|".join(patterns), re.DOTALL)
    return frozenset(
        label for label in set(labels) if listed.fullmatch(label.casefold()) or not _reduce_to_shape(label)
    )


def order_classes(labels: Iterable[str]) -> tuple[str, ...]:
    """Sort the distinct labels, by number if all are plain decimals, else by text."""
    number_of = {label: parse_decimal(label) for label in set(labels)}
    numbers = [(number, label) for label, number in number_of.items() if number is not None]
    return tuple(label for _, label in sorted(numbers)) if len(numbers) == len(number_of) else tuple(sorted(number_of))


def find_ambiguous_labels(classes: Sequence[str]) -> list[str]:
    """Describe each set of classes that a reader would take for one: the same number, or text that looks the same."""
    numbers = _find_same_numbers(classes) if all(parse_decimal(label) is not None for label in classes) else []
    shapes: dict[str, list[str]] = {}
    for label in classes:
        shapes.setdefault(_reduce_to_shape(label), []).append(label)
    lookalikes = [same for same in shapes.values() if len(same) > 1]
    return [
        *(f"labels {', '.join(map(repr, same))} are the same number, spelled differently" for same in numbers),
        *(f"labels {', '.join(map(ascii, same))} look the same but differ in characters" for same in lookalikes),
    ]


def find_suspect_numbers(classes: Sequence[str]) -> list[str]:
    """Return the sets of classes that are the same number beside others that are text, such as `'1', '1.0'`."""
    is_mixed = any(parse_decimal(label) is None for label in classes)
    return [", ".join(map(repr, same)) for same in _find_same_numbers(classes)] if is_mixed else []


def _find_same_numbers(classes: Sequence[str]) -> list[list[str]]:
    numbers: dict[Decimal, list[str]] = {}
    for label in classes:
        if (number := parse_decimal(label)) is not None:
            numbers.setdefault(number, []).append(label)
    return [same for same in numbers.values() if len(same) > 1]


def _reduce_to_shape(label: str) -> str:
    """Return a form that is the same for labels that look the same: composed, without invisible characters."""
    decomposed = unicodedata.normalize("NFD", label).translate(_CONFUSABLE)
    composed = unicodedata.normalize("NFC", "".join(map(_expand_compatible, decomposed)))
    visible = (
        " " if character.isspace() else character
        for character in _INVISIBLE.sub("", composed)
        if unicodedata.category(character) not in ("Cf", "Cc") or character.isspace()
    )
    return " ".join("".join(visible).split())


def _expand_compatible(character: str) -> str:
    """Return the letters of a Latin ligature, or the Greek letter of the micro sign; others as they are."""
    return unicodedata.normalize("NFKD", character) if character == "µ" or "ﬀ" <= character <= "ﬆ" else character
