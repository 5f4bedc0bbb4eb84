# SPDX-License-Identifier: Apache-2.0
"""How alike two videos are, ``[3, T, H, W]`` in [-1, 1] each."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(one: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = float((one.double() - other.double()).square().mean())
    return math.inf if error == 0 else 10 * math.log10(4 / error)


def ssim(one: Tensor, other: Tensor) -> float:
    """Mean structural similarity of the frames (Wang et al. 2004): Gaussian windows of 11 pixels, sigma 1.5."""
    offset = torch.arange(11, device=one.device, dtype=torch.float64) - 5
    line = torch.exp(-offset.square() / (2 * 1.5**2))
    window = (line[:, None] * line[None, :] / line.sum() ** 2).expand(3, 1, 11, 11)
    x, y = (video.double().transpose(0, 1) / 2 for video in (one, other))  # a range of 1

    def local(z: Tensor) -> Tensor:
        return F.conv2d(z, window, groups=3)

    mean_x, mean_y = local(x), local(y)
    var_x, var_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    alike = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
    return float((alike / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4))).mean())


def flicker(video: Tensor) -> float:
    """Mean absolute difference of consecutive frames."""
    return float(video.diff(dim=1).abs().mean())
