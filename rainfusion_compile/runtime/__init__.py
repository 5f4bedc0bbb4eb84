# SPDX-License-Identifier: Apache-2.0
"""Run time: what surrounds compiled graphs while a model runs."""
