"""Times the image encoder against the package's own: the same weights and images, alternating within one run.

  python scripts/bench_encoder.py                                        ViT-B at 1024 pixels, float32 and bfloat16
  python scripts/bench_encoder.py --vit h --device cuda --batch 4

Prints a table, and as the last line the same as JSON. A ratio below 1 means that ours is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from medisee.config.model import SegHeadConfig
from medisee.foundation.errors import InputError, exit_code
from medisee.models.image_encoder import PATCH, image_encoder, package_encoder
from medisee.models.seg_head import vit_sizes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Timing:
    """The figures of one precision.

    Attributes:
        dtype: its name.
        package_s, ours_s: median seconds of a forward pass.
        ratio: median over the repeats of ours / package, each from two neighbouring passes.
        cpu_ratio: the same for processor time, which other programs disturb less.
        difference: largest difference of the outputs, relative to the largest output.
    """

    dtype: str
    package_s: float
    ours_s: float
    ratio: float
    cpu_ratio: float
    difference: float


def measure(vit: str, size: int, *, batch: int, repeats: int, dtype: str, device: str) -> Timing:
    """Runs both encoders alternately, `repeats` times each, after one warm-up pass each."""
    sizes = vit_sizes(SegHeadConfig.model_validate({"vit": vit}))
    torch.manual_seed(0)
    theirs = package_encoder(sizes, size).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # the position bias starts at zero
    ours = image_encoder(sizes, size).eval()
    ours.load_state_dict(theirs.state_dict())
    encoders = [encoder.to(device, DTYPES[dtype]) for encoder in (theirs, ours)]
    pixels = torch.randn(batch, 3, size, size).to(device, DTYPES[dtype])
    expected, found = (_timed(encoder, pixels)[0].float() for encoder in encoders)
    passes: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for repeat in range(repeats):
        for index in (0, 1) if repeat % 2 == 0 else (1, 0):
            passes[index].append(_timed(encoders[index], pixels)[1:])
    package, own = torch.tensor(passes, dtype=torch.float64)  # (repeats, 2): seconds, processor seconds
    ratio, cpu_ratio = (statistics.median(values.tolist()) for values in (own / package).T)
    return Timing(
        dtype=dtype,
        package_s=statistics.median(package[:, 0].tolist()),
        ours_s=statistics.median(own[:, 0].tolist()),
        ratio=ratio,
        cpu_ratio=cpu_ratio,
        difference=float((found - expected).abs().max() / expected.abs().max()),
    )


@torch.inference_mode()
def _timed(encoder: nn.Module, pixels: Tensor) -> tuple[Tensor, float, float]:
    started, cpu_started = time.perf_counter(), time.process_time()
    embedding = encoder(pixels)
    if embedding.is_cuda:
        torch.cuda.synchronize()
    return embedding, time.perf_counter() - started, time.process_time() - cpu_started


def main(argv: Sequence[str] | None = None) -> None:
    """Measures from the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_encoder.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vit", choices=["b", "l", "h", "micro"], default="b", help="size of the encoder")
    parser.add_argument("--size", type=int, default=1024, help="side of the images, pixels")
    parser.add_argument("--batch", type=int, default=1, help="images per pass")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes of each encoder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="precisions")
    arguments = parser.parse_args(argv)
    if arguments.size < PATCH or arguments.size % PATCH:
        raise InputError(f"--size {arguments.size}: SAM's patches are {PATCH} pixels; use a multiple of {PATCH}.")
    if min(arguments.batch, arguments.repeats, arguments.threads) < 1:
        raise InputError("--batch, --repeats and --threads: expected 1 or more each.")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {arguments.device}: no CUDA device here; use --device cpu.")
    torch.set_num_threads(arguments.threads)
    print(f"{'dtype':<10}{'package s':>11}{'ours s':>11}{'ratio':>8}{'CPU ratio':>11}{'difference':>13}", flush=True)
    timings = []
    for dtype in arguments.dtypes:
        options = {key: getattr(arguments, key) for key in ("batch", "repeats", "device")}
        timing = measure(arguments.vit, arguments.size, dtype=dtype, **options)
        timings.append(timing)
        print(
            f"{dtype:<10}{timing.package_s:>11.4f}{timing.ours_s:>11.4f}{timing.ratio:>8.2f}{timing.cpu_ratio:>11.2f}"
            f"{timing.difference:>13.1e}",
            flush=True,
        )
    print(json.dumps({**vars(arguments), "torch": torch.__version__, "timings": [asdict(one) for one in timings]}))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
