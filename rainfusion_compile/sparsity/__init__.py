# SPDX-License-Identifier: Apache-2.0
"""What is kept: grids, patterns and block tables, on coordinates. No graph, no kernel."""
