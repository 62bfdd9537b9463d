"""Views of a page: mirrored, turned and scaled copies whose probabilities are averaged; names and algebra, pure.

`doccls.training.views` applies them to batches.
"""

import re
from dataclasses import dataclass
from functools import reduce

from doccls.errors import UserError

SCALES = (0.5, 2.0)  # the range that is allowed
_SCALE = re.compile(r"scale([0-9]+(?:\.[0-9]+)?)")


@dataclass(frozen=True)
class View:
    """A page that is first mirrored, if at all, then turned, then enlarged or shrunk around its centre."""

    is_mirrored: bool = False  # left and right swapped
    quarter_turns: int = 0  # counterclockwise, 0 to 3
    scale: float = 1.0  # above 1 the margins are cut off, below 1 there is white around the page

    @property
    def name(self) -> str:
        """The shortest name that `parse_view` reads; equal views have equal names."""
        turned = _NAMES[self.is_mirrored, self.quarter_turns]
        if self.scale == 1:
            return turned
        return f"scale{self.scale:g}" if turned == "id" else f"{turned}+scale{self.scale:g}"

    def then(self, other: "View") -> "View":
        """Return the view of the view: this one first."""
        # A turn of a mirrored page is the mirrored opposite turn.
        turns = -self.quarter_turns if other.is_mirrored else self.quarter_turns
        return View(self.is_mirrored != other.is_mirrored, (turns + other.quarter_turns) % 4, self.scale * other.scale)


IDENTITY = View()
_NAMES = {
    (False, 0): "id", (False, 1): "rot90", (False, 2): "rot180", (False, 3): "rot270",
    (True, 0): "hflip", (True, 2): "vflip", (True, 1): "transpose", (True, 3): "transverse",
}  # fmt: skip
_VIEWS = {name: View(*turned) for turned, name in _NAMES.items()}
# What `auto` chooses from: all ways to put a square page on itself, and two scales.
CANDIDATES = (*_VIEWS.values(), View(scale=0.9), View(scale=1.1))


def parse_views(text: str) -> tuple[View, ...]:
    """Return the views of a comma-separated list, in its order.

    Raises:
        UserError: a name is unknown, or two names mean the same view.
    """
    views: dict[View, str] = {}
    for name in text.split(","):
        view = parse_view(name)
        if view in views:
            raise UserError(f"--views: {views[view]!r} and {name.strip()!r} are the same view: state it once")
        views[view] = name.strip()
    return tuple(views)


def parse_view(name: str) -> View:
    """Return the view of a name such as `hflip`, `scale0.9` or, several in turn, `rot90+hflip+scale1.1`.

    Raises:
        UserError: the name is unknown, a scale is outside SCALES, or there are two scales.
    """
    parts = [part.strip() for part in name.split("+")]
    if sum(part.startswith("scale") for part in parts) > 1:
        raise UserError(f"--views: {name.strip()!r} has two scales: state their product")
    return reduce(View.then, (_parse_part(part, name.strip()) for part in parts))


def _parse_part(part: str, name: str) -> View:
    if part in _VIEWS:
        return _VIEWS[part]
    match = _SCALE.fullmatch(part)
    if match is None:
        where = "" if part == name else f" in {name!r}"
        raise UserError(
            f"--views: no view {part!r}{where}: allowed are auto, none, or a comma-separated list of "
            f"{', '.join(_VIEWS)}, scale<factor> such as scale0.9, and several of them joined by +"
        )
    # A few digits are plenty, and a name then holds all of them.
    scale = round(float(match[1]), 4)
    if not SCALES[0] <= scale <= SCALES[1]:
        raise UserError(f"--views: {part!r}: the factor must be from {SCALES[0]:g} to {SCALES[1]:g}")
    return View(scale=scale)
