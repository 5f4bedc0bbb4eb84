# SPDX-License-Identifier: Apache-2.0
"""What every pass asks of a graph and its nodes."""
