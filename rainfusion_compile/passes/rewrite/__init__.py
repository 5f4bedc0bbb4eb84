# SPDX-License-Identifier: Apache-2.0
"""From matches to sparse operators."""
