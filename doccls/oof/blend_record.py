"""`blend.json`: the members of a blend, their weights, and the scores by which those were chosen."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from doccls.config.paths import describe_error
from doccls.errors import UserError
from doccls.oof.blend import BlendResult
from doccls.oof.summary import LEVEL, RESAMPLES
from doccls.run.paths import RunPaths

_FORMAT = "doccls-blend-1"
_REMEDY = "delete its folder and blend the runs again, or choose another --run-id"


@dataclass(frozen=True)
class BlendMember:
    """A run of a blend."""

    path: str  # of the run's folder, relative to that of the blend, so that both can be moved together
    fingerprint: str  # of the run
    weight: float  # of its probabilities
    macro_f1: float  # of the run alone
    macro_f1_damaged: float | None  # the same on damaged copies of the pages, if it has them


def render_record(members: Sequence[BlendMember], result: BlendResult, interval_units: str) -> str:
    """Return blend.json; equal values give equal bytes. `interval_units` says what was resampled: rows or groups."""
    values: dict[str, Any] = {
        "format": _FORMAT,
        "members": [asdict(member) for member in members],
        "used": result.used,
        "decided_by": result.decided_by,
        "interval_level": LEVEL,
        "interval_resamples": RESAMPLES,
        "interval_units": interval_units,
        "candidates": [asdict(candidate) for candidate in result.candidates],
    }
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def read_members(paths: RunPaths) -> tuple[BlendMember, ...]:
    """Return the members that blend.json lists, in its order.

    Raises:
        UserError: it can't be read, is damaged, or another version of doccls wrote it.
    """
    try:
        content = json.loads(paths.blend.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise UserError(f"{paths.blend}: another version of doccls wrote it: {_REMEDY}")
        members = tuple(
            BlendMember(
                str(member["path"]),
                str(member["fingerprint"]),
                float(member["weight"]),
                float(member["macro_f1"]),
                None if member["macro_f1_damaged"] is None else float(member["macro_f1_damaged"]),
            )
            for member in content["members"]
        )
    except OSError as error:
        raise UserError(describe_error(error, paths.blend, "file")) from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{paths.blend}: damaged, or not the record of a blend: {_REMEDY}") from error
    weights = [member.weight for member in members]
    if not (weights and min(weights) >= 0 and math.isclose(sum(weights), 1)):
        raise UserError(f"{paths.blend}: damaged: its weights are {weights}, and don't sum to 1: {_REMEDY}")
    return members
