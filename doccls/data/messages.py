"""Formatting of rows, line numbers and examples in messages about a table."""

from collections.abc import Sequence

_MAX_EXAMPLES = 10


def format_examples(heading: str, examples: Sequence[str], shown: int = _MAX_EXAMPLES) -> str:
    """Format a heading with the number of examples, followed by the first `shown` of them."""
    lines = "\n".join(f"    {line}" for line in examples[:shown])
    more = f"\n    ... and {len(examples) - shown} more" if len(examples) > shown else ""
    return f"{heading}: {len(examples)}\n{lines}{more}"


def format_row(line: int, sample_id: str) -> str:
    """Format a row by its line in the file and its ID."""
    return f"line {line}: ID {sample_id!r}"


def format_lines(lines: Sequence[int]) -> str:
    """Format line numbers; of more than ten, the first ones and the number of the others."""
    shown = " and ".join(map(str, lines[:_MAX_EXAMPLES]))
    return f"{shown} and {len(lines) - _MAX_EXAMPLES} more" if len(lines) > _MAX_EXAMPLES else shown


def format_conflict(labels: Sequence[str]) -> str:
    """Format a note about rows of one image whose labels differ; empty if they agree."""
    distinct = list(dict.fromkeys(labels))
    return f", labels differ: {distinct[:_MAX_EXAMPLES]}" if len(distinct) > 1 else ""
