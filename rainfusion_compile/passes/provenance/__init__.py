# SPDX-License-Identifier: Apache-2.0
"""Axis provenance: what the dimensions of tensors are made of."""
