"""The check of timm names in a config, before any data is read."""

from __future__ import annotations

import pytest

from doccls.errors import UserError
from doccls.model.names import check_names
from tests.unit.conftest import MakeConfig


def test_known_names_pass(make_config: MakeConfig) -> None:
    check_names(make_config())
    check_names(make_config(model={"name": "test_resnet"}, train={"optimizer": "sgd"}))


@pytest.mark.parametrize(
    ("sections", "near"),
    [
        ({"model": {"name": "test_resnett"}}, "test_resnet"),
        ({"train": {"optimizer": "adamww"}}, "adamw"),
    ],
)
def test_unknown_name_is_rejected_with_suggestion(
    make_config: MakeConfig, sections: dict[str, dict[str, str]], near: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_names(make_config(**sections))
    (wrong,) = next(iter(sections.values())).values()
    assert wrong in str(caught.value) and near in str(caught.value).replace(wrong, "")
