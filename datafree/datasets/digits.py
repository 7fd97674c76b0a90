"""The UCI handwritten digits that ship with the project; digits.md documents source, licence and preparation."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def digits_file(split: str) -> Path:
    """The file of ``split``: one for each, so that testing reads no training image."""
    return Path(__file__).with_name(f"digits_{split}.npz")


def read_digits(split: str) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 1, 16, 16) and int64 labels (N,) of ``split``: "train" (1,442) or "test" (355).

    The originals are 8x8 with values 0..16; they are upsampled twofold (bilinear) and scaled to 0..255.
    """
    with np.load(digits_file(split)) as file:
        originals = torch.from_numpy(file["images"]).unsqueeze(1).float()
        labels = torch.from_numpy(file["labels"]).long()
    images = F.interpolate(originals, scale_factor=2, mode="bilinear", align_corners=False)
    return (images * 255 / 16).round().to(torch.uint8), labels
