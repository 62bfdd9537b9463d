"""Views: names, their algebra, and the pixels of each."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from doccls.data.views import CANDIDATES, IDENTITY, View, parse_view, parse_views
from doccls.errors import UserError
from doccls.training.views import apply_view

# Of each view, where the corners a b / d c of a page go; `rot90` is counterclockwise, as np.rot90.
CORNERS = {
    "id": "ab/dc", "hflip": "ba/cd", "vflip": "dc/ab", "rot180": "cd/ba", "rot90": "bc/ad", "rot270": "da/cb",
    "transpose": "ad/bc", "transverse": "cb/da",
}  # fmt: skip
DIHEDRAL = tuple(parse_view(name) for name in CORNERS)


def draw_page(size: int = 6) -> torch.Tensor:
    """Return one page of random pixels, (1, size, size, 3) uint8."""
    return torch.randint(0, 256, (1, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def draw_spot(size: int, row: int, column: int) -> torch.Tensor:
    """Return a white page with a black square of 4 px whose centre is at the corner of the pixel (row, column)."""
    page = torch.full((1, size, size, 3), 255, dtype=torch.uint8)
    page[:, row - 2 : row + 2, column - 2 : column + 2] = 0
    return page


def find_spot(page: torch.Tensor) -> tuple[float, float, float]:
    """Return the centre of the ink (row, column), px, and its area, px."""
    ink = (255 - page[0, :, :, 0].double().numpy()) / 255
    places = np.arange(len(ink)) + 0.5
    return float(ink.sum(axis=1) @ places / ink.sum()), float(ink.sum(axis=0) @ places / ink.sum()), float(ink.sum())


@pytest.mark.parametrize("name", CORNERS)
def test_corners_go_where_the_name_says(name: str) -> None:
    corners = torch.tensor([[ord("a"), ord("b")], [ord("d"), ord("c")]], dtype=torch.uint8)
    page = corners[None, :, :, None].expand(1, 2, 2, 3)
    seen = apply_view(page, parse_view(name))
    assert seen.dtype == torch.uint8 and seen.shape == (1, 2, 2, 3)
    assert "/".join("".join(map(chr, row)) for row in seen[0, :, :, 1].tolist()) == CORNERS[name]


def test_views_agree_with_numpy_at_odd_sizes() -> None:
    page = draw_page(7)
    array = page[0].numpy()
    expected = {
        "hflip": np.fliplr(array), "vflip": np.flipud(array), "rot90": np.rot90(array), "rot270": np.rot90(array, 3),
        "transpose": array.transpose(1, 0, 2), "transverse": np.rot90(array.transpose(1, 0, 2), 2),
    }  # fmt: skip
    for name, pixels in expected.items():
        assert np.array_equal(apply_view(page, parse_view(name))[0].numpy(), pixels), name


def test_view_of_a_view_is_the_composed_view() -> None:
    page = draw_page()
    for first, second in itertools.product(DIHEDRAL, repeat=2):
        composed = parse_view(f"{first.name}+{second.name}")
        assert composed in DIHEDRAL and composed == first.then(second)
        assert torch.equal(apply_view(page, composed), apply_view(apply_view(page, first), second))


def test_flips_and_turns_are_a_group() -> None:
    for first, second, third in itertools.product(DIHEDRAL, repeat=3):
        assert first.then(second).then(third) == first.then(second.then(third))
    for view in DIHEDRAL:
        assert view.then(IDENTITY) == IDENTITY.then(view) == view
        assert len({view.then(other) for other in DIHEDRAL}) == 8
        assert [view.then(other) for other in DIHEDRAL].count(IDENTITY) == 1
    assert parse_view("rot90+rot270") == parse_view("hflip+hflip") == IDENTITY


def test_identity_is_the_batch_itself() -> None:
    page = draw_page()
    assert apply_view(page, IDENTITY) is page


@pytest.mark.parametrize(("size", "scale"), [(40, 0.9), (41, 0.9), (40, 1.1), (41, 1.1), (40, 0.5), (40, 2.0)])
def test_scales_are_around_the_centre(size: int, scale: float) -> None:
    """The actual scale is the nearest with margins of whole pixels."""
    row, column = size // 2 - 4, size // 2 + 5
    before_row, before_column, before_area = find_spot(draw_spot(size, row, column))
    after_row, after_column, after_area = find_spot(apply_view(draw_spot(size, row, column), View(scale=scale)))
    actual = 1 + 2 * round(size * (scale - 1) / 2) / size
    assert abs(actual - scale) <= 1 / size
    centre = size / 2
    assert after_row - centre == pytest.approx(actual * (before_row - centre), abs=0.1)
    assert after_column - centre == pytest.approx(actual * (before_column - centre), abs=0.1)
    assert after_area == pytest.approx(actual**2 * before_area, rel=0.05)


def test_shrunk_page_is_surrounded_by_white_and_enlarged_one_is_not() -> None:
    black = torch.zeros((2, 20, 20, 3), dtype=torch.uint8)
    shrunk = apply_view(black, View(scale=0.8))
    assert shrunk.shape == black.shape and shrunk.dtype == torch.uint8
    assert bool((shrunk[:, 2:-2, 2:-2] == 0).all())
    shrunk[:, 2:-2, 2:-2] = 255
    assert bool((shrunk == 255).all())
    assert bool((apply_view(black, View(scale=1.2)) == 0).all())


@pytest.mark.parametrize("scale", [0.9, 1.1])
def test_scales_commute_with_flips_and_turns(scale: float) -> None:
    page = draw_page(24)
    for view in DIHEDRAL:
        one_way = apply_view(apply_view(page, View(scale=scale)), view)
        other_way = apply_view(page, view.then(View(scale=scale)))
        assert int((one_way.int() - other_way.int()).abs().max()) <= 1


def test_names_are_canonical_and_read_again() -> None:
    assert [view.name for view in CANDIDATES] == [
        "id", "rot90", "rot180", "rot270", "hflip", "vflip", "transpose", "transverse", "scale0.9", "scale1.1",
    ]  # fmt: skip
    assert parse_views(",".join(view.name for view in CANDIDATES)) == CANDIDATES
    assert parse_view("hflip+vflip").name == "rot180"
    assert parse_view(" rot90 + scale1.10 + hflip ").name == "transverse+scale1.1"
    assert parse_view("scale1.0") == IDENTITY
    assert parse_views("vflip, id")[0].name == "vflip"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,flip", r"no view 'flip': allowed are auto, none, or a comma-separated list of id, rot90, .*, scale<"),
        ("rot90+flop", r"no view 'flop' in 'rot90\+flop'"),
        ("", r"no view ''"),
        ("id,none", r"no view 'none'"),
        ("scale-1", r"no view 'scale-1'"),
        ("scale3", r"'scale3': the factor must be from 0.5 to 2"),
        ("scale0.9+scale1.1", r"has two scales"),
        ("rot180,id,hflip+vflip", r"'rot180' and 'hflip\+vflip' are the same view: state it once"),
        ("id,id", r"'id' and 'id' are the same view"),
    ],
)
def test_wrong_names_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_views(text)
