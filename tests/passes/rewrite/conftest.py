# SPDX-License-Identifier: Apache-2.0
"""Every test of this folder compiles anew."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
