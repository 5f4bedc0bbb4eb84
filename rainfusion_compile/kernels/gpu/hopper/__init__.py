# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel, in Gluon."""
