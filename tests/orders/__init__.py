# SPDX-License-Identifier: Apache-2.0
"""Random models whose tokens are in order or not, and a judge of what is said of them."""
