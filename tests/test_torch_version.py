# SPDX-License-Identifier: Apache-2.0
"""A version of torch that was not tested is told of, once."""

from __future__ import annotations

import logging

import pytest

from rainfusion_compile import torch_version


@pytest.mark.parametrize("version", ["2.10.1", "2.16.0", "3.0.0a0+git1"])
def test_other_versions_are_told_of_once(caplog, version):
    torch_version.warn_if_untested.cache_clear()
    with caplog.at_level(logging.WARNING, logger="rainfusion_compile"):
        torch_version.warn_if_untested(version)
        torch_version.warn_if_untested(version)
    (told,) = [record.getMessage() for record in caplog.records]
    assert f"tested with torch 2.11 to 2.15, and this is {version}" in told


@pytest.mark.parametrize("version", ["2.11.0", "2.12.1", "2.13.0+cpu", "2.14.1", "2.15.0+cu132"])
def test_tested_ones_are_not(caplog, version):
    torch_version.warn_if_untested(version)
    assert not caplog.records


def test_the_readme_names_the_tested_ones(pytestconfig):
    first, last = (".".join(map(str, tested)) for tested in torch_version.TESTED)
    assert f"torch {first} to {last}" in (pytestconfig.rootpath / "README.md").read_text()
