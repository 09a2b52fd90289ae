"""Frozen image features, computed once: safetensors shards in float16, keyed by the image's and the encoder's content.

A shard names its images in its metadata and is complete or absent, so an interrupted run loses one shard at most.

Shapes: C channels, G grid.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from medisee.foundation.errors import InputError
from medisee.foundation.files import atomic_path, sha256
from medisee.foundation.output import check_output
from medisee.models.processing import MediSeeProcessor
from medisee.models.seg_head import SamHead
from medisee.records.images import read_image

SHARD = 64
BATCH = 4
KEYS = "keys"


class FeatureCache:
    """Features on disk, read row by row from memory-mapped files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: dict[str, tuple[str, int]] = {}
        self._keys: dict[Path, str] = {}
        for shard in folder.glob("*.safetensors"):
            with suppress(OSError, SafetensorError), safe_open(str(shard), framework="pt") as handle:
                keys = (handle.metadata() or {}).get(KEYS, "").split()
                if handle.get_slice("features").get_shape()[0] == len(keys):
                    self._rows |= {key: (shard.name, row) for row, key in enumerate(keys)}

    def __contains__(self, image: Path) -> bool:
        return self._key(image) in self._rows

    def read(self, image: Path) -> Tensor:
        """Returns the embedding (C, G, G) of an image file, float16."""
        shard, row = self._rows[self._key(image)]
        with safe_open(str(self.folder / shard), framework="pt") as handle:
            return handle.get_slice("features")[row : row + 1][0]

    def add(self, images: Sequence[Path], features_NCGG: Tensor) -> None:
        """Writes the features of a few images as one shard."""
        keys = [self._key(image) for image in images]
        shard = f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:16]}.safetensors"
        with atomic_path(self.folder / shard) as temporary:
            save_file({"features": features_NCGG.half().contiguous()}, str(temporary), metadata={KEYS: " ".join(keys)})
        self._rows |= {key: (shard, row) for row, key in enumerate(keys)}

    def _key(self, image: Path) -> str:
        if image not in self._keys:
            try:
                self._keys[image] = sha256(image)
            except OSError as error:
                raise InputError(f"{image}: cannot be read ({error.strerror}); copy it again.") from error
        return self._keys[image]


def encoder_key(head: SamHead) -> str:
    """Hashes the encoder's weights and input rule, so that no other encoder reads these features."""
    digest = hashlib.sha256(repr(head.spec).encode())
    for name, value in sorted(head.image_encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def fill_cache(
    images: Iterable[Path],
    head: SamHead,
    processor: MediSeeProcessor,
    folder: Path,
    dtype: torch.dtype,
    *,
    skip_corrupt: bool = False,
) -> FeatureCache:
    """Computes the missing features in `dtype` and returns the cache, below `folder`; prints their size first.

    `skip_corrupt`: leave out images that cannot be read; reading their records reports them.
    """
    if head.encoder_learns:
        raise InputError(
            f"data.cache = {str(folder)!r}: needs a frozen encoder, but model.seg_head.lora lets it learn; "
            "remove one of them."
        )
    cache = FeatureCache(folder / f"{encoder_key(head)}-{str(dtype).removeprefix('torch.')}")
    unreadable = suppress(*([InputError] if skip_corrupt else []))
    missing = []
    for image in dict.fromkeys(images):
        with unreadable:
            if image not in cache:
                missing.append(image)
    if not missing:
        return cache
    size = 2 * len(missing) * head.spec.channels * head.spec.grid**2
    check_output(folder, option="data.cache", need=size)
    print(f"features: {len(missing)} images to encode once, {size / 2**20:.0f} MiB in {cache.folder}", flush=True)
    device = next(head.parameters()).device
    # A copy: rounding the model's own weights to 16 bit and back would change them.
    encoder = copy.deepcopy(head.image_encoder).to(dtype).to(memory_format=torch.channels_last)
    started = time.perf_counter()
    for first in tqdm(range(0, len(missing), SHARD), desc="features", unit="shard"):
        part = missing[first : first + SHARD]
        done, embedded = [], []
        for at in range(0, len(part), BATCH):
            pixels = {}
            for image in part[at : at + BATCH]:
                with unreadable:
                    pixels[image] = processor.seg_pixels(read_image(image))
            if pixels:
                with torch.inference_mode():
                    embedded.append(encoder(torch.stack(list(pixels.values())).to(device, dtype)).half().cpu())
                done += pixels
        if done:
            cache.add(done, torch.cat(embedded))
    print(f"features: done in {time.perf_counter() - started:.0f} s", flush=True)
    return cache
