# SPDX-License-Identifier: Apache-2.0
"""Which attentions are self-attention over a video."""
