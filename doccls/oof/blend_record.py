"""`blend.json`: the members of a blend, their weights, and the scores by which those were chosen."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from doccls.config.paths import describe_error
from doccls.errors import UserError
from doccls.oof.adjust import Adjustment
from doccls.oof.blend import BlendResult
from doccls.oof.bootstrap import GAIN_LEVEL, LEVEL, RESAMPLES
from doccls.oof.summary import Summary
from doccls.oof.thresholds import Thresholds
from doccls.run.paths import RunPaths

_FORMAT = "doccls-blend-1"
_REMEDY = "delete its folder and blend the runs again, or choose another --run-id"


# They are learned for one run, and act on its folds.
NO_THRESHOLDS = Thresholds(None, None, None, None, "not tried for a blend")


@dataclass(frozen=True)
class BlendMember:
    """A run of a blend."""

    path: str  # of the run's folder, relative to that of the blend, so that both can be moved together
    fingerprint: str  # of the run
    weight: float  # of its probabilities
    macro_f1: float  # of the run alone
    macro_f1_damaged: float | None  # the same on damaged copies of the pages, if it has them


@dataclass(frozen=True)
class BlendRecord:
    """What `doccls predict` needs of blend.json."""

    members: tuple[BlendMember, ...]
    adjustment: Adjustment  # of the blended probabilities


def render_record(members: Sequence[BlendMember], result: BlendResult, summary: Summary) -> str:
    """Return blend.json; equal values give equal bytes. `summary` is that of the blended OOF predictions."""
    values: dict[str, Any] = {
        "format": _FORMAT,
        "members": [asdict(member) for member in members],
        "used": result.used,
        "decided_by": result.decided_by,
        "interval_level": LEVEL,
        "gain_level": GAIN_LEVEL,
        "interval_resamples": RESAMPLES,
        "interval_units": summary.interval_units,
        "candidates": [asdict(candidate) for candidate in result.candidates],
        "folds": [row.fold for row in summary.folds],
        "temperature": summary.calibration[result.decided_by].temperature,
    }
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def read_record(paths: RunPaths) -> BlendRecord:
    """Return the content of blend.json.

    Raises:
        UserError: it can't be read, is damaged, or another version of doccls wrote it.
    """
    try:
        content = json.loads(paths.blend.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise UserError(f"{paths.blend}: another version of doccls wrote it: {_REMEDY}")
        record = BlendRecord(tuple(map(_parse_member, content["members"])), _parse_adjustment(content))
    except OSError as error:
        raise UserError(describe_error(error, paths.blend, "file")) from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{paths.blend}: damaged, or not the record of a blend: {_REMEDY}") from error
    weights = [member.weight for member in record.members]
    if not (weights and min(weights) >= 0 and math.isclose(sum(weights), 1)):
        raise UserError(f"{paths.blend}: damaged: its weights are {weights}, and don't sum to 1: {_REMEDY}")
    return record


def _parse_member(values: dict[str, Any]) -> BlendMember:
    return BlendMember(
        str(values["path"]),
        str(values["fingerprint"]),
        float(values["weight"]),
        float(values["macro_f1"]),
        None if values["macro_f1_damaged"] is None else float(values["macro_f1_damaged"]),
    )


def _parse_adjustment(content: dict[str, Any]) -> Adjustment:
    return Adjustment(
        temperature=float(content["temperature"]),
        thresholds=NO_THRESHOLDS,
        folds=tuple(map(int, content["folds"])),
        learned_from=str(content["decided_by"]),
    )
