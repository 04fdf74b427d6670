"""The tests' own skips cannot rot: what must be there and is not fails."""

from __future__ import annotations

import platform

import features
import pytest
from features import Feature, needs

OPTION = "CONFIG_MPTCP"


def feature(present: bool, minimum: tuple[int, int] = (5, 6), option: str | None = OPTION) -> Feature:
    return Feature("a feature", minimum, option, lambda: present)


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(features, "_configuration", lambda: tuple(request.param))


def test_what_is_there_is_not_skipped() -> None:
    needs(feature(present=True))


@pytest.mark.parametrize("configured", [[f"{OPTION}=y"], [f"{OPTION}=m"], []], indirect=True)
@pytest.mark.usefixtures("configured")
def test_what_a_new_enough_kernel_lacks_although_it_was_built_with_it_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match="a feature is missing, although"):
        needs(feature(present=False))


@pytest.mark.parametrize("configured", [[f"# {OPTION} is not set"], [f"{OPTION}_IPV6=y"]], indirect=True)
@pytest.mark.usefixtures("configured")
def test_what_the_configuration_left_out_is_skipped_by_name() -> None:
    with pytest.raises(pytest.skip.Exception, match=f"lacks a feature: it was built without {OPTION}"):
        needs(feature(present=False))


def test_what_came_after_the_running_kernel_is_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "5.4.0")
    with pytest.raises(pytest.skip.Exception, match="lacks a feature"):
        needs(feature(present=False))


def test_what_no_option_can_leave_out_is_never_skipped() -> None:
    with pytest.raises(pytest.fail.Exception):
        needs(feature(present=False, option=None))


def test_a_feature_newer_than_the_oldest_kernel_we_claim_is_a_mistake_of_the_test() -> None:
    with pytest.raises(pytest.fail.Exception, match="no kernel that we claim"):
        needs(feature(present=True, minimum=(6, 5)))


@pytest.mark.parametrize("known", [features.MPTCP, features.NFT_NAT, features.KERNEL_BTF])
def test_every_known_feature_is_older_than_the_oldest_kernel_we_claim(known: Feature) -> None:
    assert known.minimum <= features.MINIMUM_KERNEL
