"""Original pixels <-> a model's square input frame, for images of any shape, in float32.

Coordinates:
  original: pixels of the image, x to the right, y down, boxes half-open (x1, y1 exclusive)
  normalised: original divided by (width, height), in [0, 1]
  frame: pixels of the square input of side `size`; the image fills [0, resized_width] x [0, resized_height] of it

Shapes: I targets, H W original size, S frame side, h w low-resolution mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from medisee.records.masks import bounded_size

SAM_MEAN = (123.675, 116.28, 103.53)
SAM_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True, slots=True)
class Frame:
    """Where one image is in the square input frame, in pixels."""

    height: int  # of the original image
    width: int
    size: int  # side of the frame
    resized_height: int  # the part of the frame that the image fills; the rest is padding
    resized_width: int


def fit(height: int, width: int, size: int, resize: Literal["longest", "stretch"]) -> Frame:
    """Places an image of `height` x `width` pixels in a frame of side `size`."""
    if resize == "stretch":
        return Frame(height, width, size, size, size)
    scale = size / max(height, width)
    return Frame(height, width, size, max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))


def to_frame(image: np.ndarray, frame: Frame, pixels: Literal["sam", "minmax"]) -> Tensor:
    """Resizes, standardises and pads an image, uint8 (H, W, 3) -> float32 (3, S, S).

    `sam`: by SAM's mean and standard deviation; `minmax`: to [0, 1] over the image. Padding is 0 after standardisation,
    as SAM and LiteMedSAM pad.
    """
    resized = Image.fromarray(image).resize((frame.resized_width, frame.resized_height), Image.Resampling.BILINEAR)
    values = torch.from_numpy(np.asarray(resized, dtype=np.float32)).permute(2, 0, 1)
    if pixels == "sam":
        values = (values - torch.tensor(SAM_MEAN)[:, None, None]) / torch.tensor(SAM_STD)[:, None, None]
    else:
        low, high = values.amin(), values.amax()
        values = (values - low) / (high - low).clamp(min=1e-8)
    return F.pad(values, (0, frame.size - frame.resized_width, 0, frame.size - frame.resized_height))


def boxes_to_frame(boxes_I4: Tensor, frames: list[Frame], scale: Literal["resized", "frame"] = "resized") -> Tensor:
    """Maps normalised xyxy boxes (I, 4) into the pixels of their images' frames, float32; see `Model.box_frame`."""
    sides = [(f.resized_width, f.resized_height) if scale == "resized" else (f.size, f.size) for f in frames]
    scale_I4 = torch.tensor([side * 2 for side in sides], dtype=torch.float32, device=boxes_I4.device)
    return boxes_I4.float() * scale_I4.reshape(-1, 4)  # there may be no target


def token_places(frame: Frame, grid: int, over: Literal["frame", "pad", "centre_crop"]) -> Tensor:
    """Returns the part of the image that each of grid x grid image tokens sees, row by row.

    The tokens divide `over`: the seg head's frame, the image padded to a square, or its central square. Normalised (cx,
    cy, w, h), float32 (grid^2, 4); a token that sees only padding has no area.
    """
    if over == "frame":
        top = left = 0.0
        height, width = frame.size / frame.resized_height, frame.size / frame.resized_width
    else:
        side, above, before = square_of(frame.height, frame.width, over)
        top, left = above / frame.height, before / frame.width
        height, width = side / frame.height, side / frame.width
    edges = torch.arange(grid + 1, dtype=torch.float32) / grid
    rows, columns = (top + edges * height).clamp(0, 1), (left + edges * width).clamp(0, 1)
    y0, x0 = torch.meshgrid(rows[:-1], columns[:-1], indexing="ij")
    y1, x1 = torch.meshgrid(rows[1:], columns[1:], indexing="ij")
    return torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1).flatten(0, 1)


def square_of(height: int, width: int, kind: Literal["pad", "centre_crop"]) -> tuple[int, int, int]:
    """Returns side, top and left of the square that a vision tower sees, in the image's pixels.

    `pad`: the smallest square around the image, whose top or left is negative. `centre_crop`: the largest inside it.
    """
    side = max(height, width) if kind == "pad" else min(height, width)
    top, left = abs(side - height) // 2, abs(side - width) // 2
    return (side, -top, -left) if kind == "pad" else (side, top, left)


def normalise_box(
    box: tuple[float, float, float, float], height: int, width: int, *, inclusive: bool = False
) -> tuple[float, float, float, float]:
    """Divides a half-open xyxy box in original pixels by (width, height); `inclusive`: one pixel short (release)."""
    return (box[0] / width, box[1] / height, (box[2] - inclusive) / width, (box[3] - inclusive) / height)


def denormalise_box(box: Tensor, height: int, width: int) -> tuple[float, float, float, float]:
    """Maps a normalised xyxy box (4,) to original pixels, clamped to the image."""
    x0, y0, x1, y1 = (box.detach().float().clamp(0, 1).cpu() * torch.tensor([width, height] * 2)).tolist()
    return (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))


def cxcywh_to_xyxy(boxes_I4: Tensor) -> Tensor:
    """Converts normalised (cx, cy, w, h) boxes (I, 4) to (x0, y0, x1, y1), which may cross the image's border."""
    center, half = boxes_I4[:, :2], boxes_I4[:, 2:] / 2
    return torch.cat([center - half, center + half], dim=1)


def logits_to_original(logits_hw: Tensor, frame: Frame, size: tuple[int, int] | None = None) -> Tensor:
    """Resamples mask logits (h, w) of the whole frame to the image, at `size` or else its own size: (H, W)."""
    full = F.interpolate(
        logits_hw[None, None].float(), size=(frame.size, frame.size), mode="bilinear", align_corners=False
    )
    full = full[..., : frame.resized_height, : frame.resized_width]
    size = size or (frame.height, frame.width)
    return F.interpolate(full, size=size, mode="bilinear", align_corners=False)[0, 0]


def bounded_mask(mask_HW: np.ndarray, longest: int) -> Tensor:
    """Scales a boolean mask down to its `bounded_size`: float32 coverage in [0, 1], area-averaged."""
    height, width = mask_HW.shape
    size = bounded_size(height, width, longest)
    return F.adaptive_avg_pool2d(torch.from_numpy(np.ascontiguousarray(mask_HW)).float()[None, None], size)[0, 0]


def mask_to_frame(mask_HW: np.ndarray, frame: Frame, side: int) -> Tensor:
    """Resamples a boolean mask (H, W) into the frame at `side` x `side`: float32 coverage in [0, 1], 0 in the padding.

    Area averaging keeps thin structures, which nearest-neighbour sampling would break.
    """
    height = max(1, round(frame.resized_height * side / frame.size))
    width = max(1, round(frame.resized_width * side / frame.size))
    values = torch.from_numpy(np.ascontiguousarray(mask_HW)).float()[None, None]
    # Per axis: one that shrinks is averaged, one that grows is interpolated.
    small = F.adaptive_avg_pool2d(values, (min(height, frame.height), min(width, frame.width)))
    small = F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)
    return F.pad(small[0, 0], (0, side - width, 0, side - height))
