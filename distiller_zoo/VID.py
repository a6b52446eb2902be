"""Variational Information Distillation for Knowledge Transfer (Ahn et al., CVPR 2019, arXiv 1904.05835)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def vid_loss(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood of a teacher's map under Gaussians, but for the constant.

    Args:
        mean: the map that the student predicts, (B, C, H, W).
        variance: variance of each channel, positive, (C,).
        target: the teacher's map, (B, C, H, W).

    Returns:
        Scalar, the mean over all elements.
    """
    variance = variance.view(-1, 1, 1)
    return ((mean - target) ** 2 / variance + variance.log()).mean() / 2


class VIDLoss(nn.Module):
    """``vid_loss`` of a teacher's map that three 1 x 1 convolutions predict from a student's.

    Its weights are trained with the student.

    Args:
        num_input_channels: channels of the student's map.
        num_mid_channel: channels of the predictor's two hidden maps.
        num_target_channels: channels of the teacher's map.
        init_pred_var: every channel's first variance, larger than eps.
        eps: the least variance.
    """

    def __init__(
        self,
        num_input_channels: int,
        num_mid_channel: int,
        num_target_channels: int,
        init_pred_var: float = 5.0,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.regressor = nn.Sequential(
            nn.Conv2d(num_input_channels, num_mid_channel, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(num_mid_channel, num_mid_channel, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(num_mid_channel, num_target_channels, 1, bias=False),
        )
        # The variance is its softplus, plus eps.
        self.log_scale = nn.Parameter(torch.full((num_target_channels,), math.log(math.expm1(init_pred_var - eps))))
        self.eps = eps

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss between a student's map (B, C_s, H_s, W_s) and a teacher's (B, C_t, H_t, W_t), a scalar.

        The larger map is average-pooled to the size of the smaller.

        Raises:
            ValueError: the predicted map and the teacher's still differ in shape.
        """
        input, target = input.to(self.log_scale.dtype), target.to(self.log_scale.dtype)
        if input.shape[2] > target.shape[2]:
            input = F.adaptive_avg_pool2d(input, target.shape[2:])
        elif input.shape[2] < target.shape[2]:
            target = F.adaptive_avg_pool2d(target, input.shape[2:])
        mean = self.regressor(input)
        if mean.shape != target.shape:
            raise ValueError(f"VID predicts a map {tuple(mean.shape)}, but the teacher's is {tuple(target.shape)}")
        return vid_loss(mean, F.softplus(self.log_scale) + self.eps, target)
