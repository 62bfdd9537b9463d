"""Names that a config takes from timm: told before any data is read."""

from __future__ import annotations

import pytest

from doccls.errors import UserError
from doccls.model.names import check_names
from tests.unit.conftest import MakeConfig


def test_names_that_timm_knows_pass(make_config: MakeConfig) -> None:
    check_names(make_config())
    check_names(make_config(model={"name": "test_resnet"}, train={"optimizer": "sgd"}))


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"model": {"name": "test_resnett"}}, "test_resnet"),
        ({"train": {"optimizer": "adamww"}}, "adamw"),
    ],
)
def test_a_name_that_timm_does_not_know_is_told_with_a_near_one(
    make_config: MakeConfig, sections: dict[str, dict[str, str]], told: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_names(make_config(**sections))
    (wrong,) = next(iter(sections.values())).values()
    assert wrong in str(caught.value) and told in str(caught.value).replace(wrong, "")
