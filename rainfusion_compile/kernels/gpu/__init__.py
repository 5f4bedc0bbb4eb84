# SPDX-License-Identifier: Apache-2.0
"""The GPU engine, in Triton."""
