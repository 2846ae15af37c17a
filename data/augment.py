"""Random changes of whole batches, each image by its own draw."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def random_shift(images: Tensor, pixels: int = 2) -> Tensor:
    """Shift each image `[N, C, H, W]` by its own random -pixels..pixels along each axis."""
    n, channels, height, width = images.shape
    down, right = torch.randint(2 * pixels + 1, (2, n), device=images.device)
    padded = F.pad(images, (pixels,) * 4).contiguous()
    image, channel, row, _ = padded.stride()
    last = (n - 1) * image + 2 * pixels * (row + 1)  # place of the last window there is
    windows = padded.as_strided((max(0, last + 1), channels, height, width), (1, channel, row, 1))
    return windows.index_select(0, torch.arange(n, device=images.device) * image + down * row + right)


def random_affine(images: Tensor, degrees: float = 10.0, scale: float = 0.1,
                  pixels: float = 2.0) -> Tensor:
    """Turn, scale and shift each image `uint8 [N, C, H, W]` by its own random amounts.

    Args:
        degrees: largest rotation, either way.
        scale: largest change of size, as a share.
        pixels: largest shift along each axis.
    """
    n, _, height, width = images.shape
    angle, zoom, right, down = 2 * torch.rand(4, n, device=images.device) - 1
    angle, zoom = angle * math.radians(degrees), 1 + zoom * scale
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    where = torch.stack([cos, -sin, right * 2 * pixels / width,
                         sin, cos, down * 2 * pixels / height], dim=1).view(n, 2, 3)
    grid = F.affine_grid(where, images.shape, align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False).round().to(torch.uint8)


def shift_and_flip(images: Tensor, pixels: int = 2) -> Tensor:
    """Mirror about half of the images `[N, C, H, W]`, then shift each by its own random amount."""
    coin = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return random_shift(torch.where(coin, images.flip(3), images), pixels)
