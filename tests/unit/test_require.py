"""The `need` fixture: a skip that says what is missing, or a failure where the suite is required."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Need = Callable[[str, bool, str], None]


def test_what_is_available_goes_on(need: Need, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCCLS_REQUIRE", "suite-4711")
    need("suite-4711", True, "no matter")


@pytest.mark.parametrize("required", [None, "", "other", "suite-47110", "suite"])
def test_what_is_missing_is_skipped_with_its_reason(
    need: Need, monkeypatch: pytest.MonkeyPatch, required: str | None
) -> None:
    if required is None:
        monkeypatch.delenv("DOCCLS_REQUIRE", raising=False)
    else:
        monkeypatch.setenv("DOCCLS_REQUIRE", required)
    told = need.__globals__["_skipped"]
    before = dict(told)
    try:
        with pytest.raises(pytest.skip.Exception, match="suite 'suite-4711': no such folder"):
            need("suite-4711", False, "no such folder")
        assert told["suite-4711"] == "no such folder", "the end of the run says it again"
    finally:
        told.clear()
        told.update(before)


@pytest.mark.parametrize("required", ["suite-4711", "other,suite-4711", "suite-4711,other"])
def test_what_is_missing_fails_where_it_is_required(need: Need, monkeypatch: pytest.MonkeyPatch, required: str) -> None:
    monkeypatch.setenv("DOCCLS_REQUIRE", required)
    with pytest.raises(pytest.fail.Exception, match=r"'suite-4711' is required \(DOCCLS_REQUIRE\) but no such folder"):
        need("suite-4711", False, "no such folder")
