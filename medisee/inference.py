"""Asks a model about images. Run it as

  python scripts/inference.py --checkpoint runs/demo/checkpoint --image slice.png \\
      --query "Which structure relays almost all sensory information to the cortex?" --out runs/answer

Prints the answers and writes, for each image and query, mask.png (0 and 255, of the image's size), overlay.png (image,
mask, box, words) and prediction.json (all of it as data, with the mask as COCO RLE): into OUT itself for one image and
one query, otherwise into OUT/<image>[-<number of the query>]/. OUT/run.json says how they were made.

The model decides by itself whether it marks a region. When it writes no [SEG] and [BBOX], mask.png is all zero.
--decode forced gives it the answer "It is [SEG] and [BBOX]." instead: a region for every query, but no words.

--plan prints what a checkpoint or a configuration needs, without image, query or weights.

From Python: model = MediSee.from_pretrained(folder), then ask(model, image, query).
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from medisee.config import Eval
from medisee.config.load import load_config
from medisee.evaluation import prediction
from medisee.evaluation.drawing import overlay
from medisee.foundation.errors import InputError, exit_code, first_line
from medisee.foundation.files import atomic_path, write_json
from medisee.foundation.provenance import run_facts
from medisee.models.medisee import MediSee
from medisee.models.processing import Example, Query
from medisee.planning.plan import GPU, checkpoint_config, plan_inference
from medisee.planning.plan_tables import render_inference_plan
from medisee.records.images import read_image
from medisee.records.masks import Box, decode_mask, encode_mask
from medisee.records.prompts import candidate_text
from medisee.weights.checkpoints import local_checkpoint, read_description
from medisee.weights.hub import is_hub_id

Decode = Literal["generate", "forced"]
MAX_NEW_TOKENS = Eval().max_new_tokens
MASK, OVERLAY, PREDICTION, RUN = "mask.png", "overlay.png", "prediction.json", "run.json"

_MODES: dict[Decode, prediction.Mode] = {"generate": "generated", "forced": "forced"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """What the model says about one image and one query.

    Attributes:
        image: (H, W, 3) uint8, RGB, as it was read.
        question: the query.
        text: what the model wrote, with its candidate tokens.
        plain_text: the same for people, see `plain_text`.
        emitted: whether the model wrote all candidate tokens, that is: whether it marks a region.
        mask: (H, W) bool; None when nothing was emitted.
        box: half-open xyxy in pixels of the image; None when nothing was emitted.
        scores: `mask_confidence`, the mean probability inside the mask; empty when nothing was emitted.
    """

    image: NDArray[np.uint8]
    question: str
    text: str
    plain_text: str
    emitted: bool
    mask: NDArray[np.bool_] | None
    box: Box | None
    scores: dict[str, float]


def ask(
    model: MediSee,
    image: Path | str | NDArray[np.uint8],
    query: str,
    *,
    decode: Decode = "generate",
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Answer:
    """Asks one query about one image; see `ask_all`."""
    return ask_all(model, image, [query], decode=decode, max_new_tokens=max_new_tokens)[0]


def ask_all(
    model: MediSee,
    image: Path | str | NDArray[np.uint8],
    queries: Sequence[str],
    *,
    decode: Decode = "generate",
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[Answer]:
    """Asks queries about one image, all in one pass; the image is encoded once.

    Args:
        model: in evaluation mode, as `MediSee.from_pretrained` returns it.
        image: a PNG, JPEG or TIFF file, or pixels (H, W, 3) uint8, RGB.
        queries: one or more; none sees another.
        decode: `generate`: the model writes its answer; `forced`: it is given the answer and marks a region always.
        max_new_tokens: longest answer that it writes.

    Returns:
        An answer for each query, in their order.

    Raises:
        InputError: the image cannot be read or is of another form, there is no query, one is empty or too long.
    """
    pixels = _pixels(image)
    if problems := query_problems(queries):
        raise InputError(problems)
    asked = tuple(Query(record="image", target=f"query {n}", question=q) for n, q in enumerate(queries, 1))
    example = Example(pixels, pixels.shape[0], pixels.shape[1], asked)
    settings = Eval(max_new_tokens=max_new_tokens)
    answers = prediction.answer(model, [example], _MODES[decode], settings)
    tokens = model.config.candidate_tokens
    return [
        Answer(
            image=pixels,
            question=one.question,
            text=one.text,
            plain_text=plain_text(one.text, tokens),
            emitted=one.emitted,
            mask=decode_mask(one.mask) if one.mask else None,
            box=one.box,
            scores=one.scores,
        )
        for one in answers
    ]


def plain_text(text: str, tokens: Sequence[str]) -> str:
    """Returns an answer for people: "It is [SEG] and [BBOX]. It makes bile." -> "It is this region. It makes bile."

    Line breaks and characters that a terminal would obey become spaces.

    Args:
        text: what the model wrote.
        tokens: its candidate tokens.
    """
    token = "|".join(map(re.escape, tokens))
    listed = re.sub(rf"(?:{token})(?:(?:,|\s|\band\b)*(?:{token}))*", "this region", text)
    return " ".join("".join(c if c.isprintable() else " " for c in listed).split())


def _pixels(image: Path | str | NDArray[np.uint8]) -> NDArray[np.uint8]:
    if isinstance(image, (str, Path)):
        return read_image(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise InputError(f"image: expected pixels (H, W, 3) of uint8, got {image.shape} of {image.dtype}; convert it.")
    return image


def query_problems(queries: Sequence[str]) -> list[str]:
    """Returns what is wrong with queries, whatever the model."""
    problems = [] if queries else ["no query; expected one or more; ask something."]
    for number, query in enumerate(queries, 1):
        if not query.strip():
            problems.append(f"query {number} {query!r} has no text; expected a question; ask something.")
        elif any("\ud800" <= character <= "\udfff" for character in query):
            problems.append(f"query {number} {query!r} is no Unicode text; expected UTF-8; check how it was typed.")
    return problems


def main(argv: Sequence[str] | None = None) -> None:
    """Answers queries about images from the command line."""
    if "--plan" in (sys.argv[1:] if argv is None else argv):
        print(_plan(argv), end="")
        return
    arguments = _parser().parse_args(argv)
    images: list[Path] = arguments.image
    folders = _folders(arguments.out, images, len(arguments.query))
    device = _check(arguments, [folder for its in folders for folder in its])
    started = time.perf_counter()
    chosen = {"bits": arguments.bits, "device_map": arguments.device_map}
    model = MediSee.from_pretrained(arguments.checkpoint, device=arguments.device, **chosen)
    if arguments.device is None:
        device = model.pinned_device or device
        model.placed(device)
    facts = _facts(arguments, device)
    marked = 0
    several = None if len(images) > 1 else True  # None: a bar on a terminal only
    for image, its in zip(tqdm(images, desc="images", unit="image", disable=several), folders, strict=True):
        answers = ask_all(
            model, image, arguments.query, decode=arguments.decode, max_new_tokens=arguments.max_new_tokens
        )
        for folder, answer in zip(its, answers, strict=True):
            note = "" if answer.emitted else _no_region(model)
            _write(folder, image.name, answer, arguments.decode, note)
            tqdm.write(_report(folder, image.name, answer, note))
            marked += answer.emitted
    write_json(arguments.out / RUN, {**facts, "seconds": round(time.perf_counter() - started, 3)})
    print(f"done: {sum(map(len, folders))} answer(s), {marked} with a region, in {arguments.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="folder that training wrote, or a hub id")
    add(
        "--image",
        type=Path,
        required=True,
        action="append",
        metavar="F",
        help="PNG, JPEG or TIFF; give it again for more",
    )
    add("--query", required=True, action="append", metavar="TEXT", help="question; give it again for more")
    add("--out", type=Path, required=True, metavar="OUT", help="folder; its answers of an earlier run are replaced")
    add("--decode", choices=get_args(Decode), default="generate", help="who writes the answer (default: generate)")
    add("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N", help=f"default: {MAX_NEW_TOKENS}")
    add("--device", help="as cpu or cuda:1 (default: the first GPU, else the CPU)")
    published = "for checkpoints that build on published weights (default: as in training)"
    add(
        "--bits",
        type=int,
        choices=(4, 8),
        help=f"hold the language model in 4 or 8 bits, on an NVIDIA GPU; {published}",
    )
    add("--device-map", choices=("auto",), help=f"spread its layers over all GPUs and main memory; {published}")
    add("--plan", action="store_true", help="print memory and arithmetic instead, see --plan --help")
    return parser


def _plan(argv: Sequence[str] | None) -> str:
    """Says what inference needs; it takes a checkpoint or a configuration, and neither image nor query."""
    parser = argparse.ArgumentParser(
        prog=f"{Path(sys.argv[0]).name} --plan",
        description="Prints parameters, memory, arithmetic and missing files, and ends.",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, metavar="DIR", help="folder that training wrote")
    model.add_argument("--config", metavar="C", help="YAML run; its files may be missing")
    parser.add_argument("--plan", action="store_true", help="this")
    parser.add_argument("--gpu", default=GPU, metavar="NAME", help=f"such as rtx4090 (default: {GPU})")
    arguments = parser.parse_args(argv)
    config = checkpoint_config(arguments.checkpoint) if arguments.checkpoint else load_config(arguments.config)
    return render_inference_plan(plan_inference(config, gpu=arguments.gpu))


def _check(arguments: argparse.Namespace, folders: Sequence[Path]) -> torch.device:
    """Looks at every input, before the model is loaded, and tells all problems together."""
    problems = query_problems(arguments.query)
    if arguments.max_new_tokens < 1:
        problems.append(f"--max-new-tokens is {arguments.max_new_tokens}; expected 1 or more; raise it.")
    for image in arguments.image:
        problems += _problems_of(lambda image=image: read_image(image))
    problems += _out_problems(folders, arguments.image)
    problems += _problems_of(lambda: _device(arguments.device))
    # Nothing is fetched from the hub in vain.
    if not (problems and is_hub_id(arguments.checkpoint)):
        problems += _problems_of(lambda: read_description(local_checkpoint(arguments.checkpoint)))
    if problems:
        raise InputError(problems)
    return _device(arguments.device)


def _problems_of(look: Callable[[], object]) -> tuple[str, ...]:
    try:
        look()
    except InputError as error:
        return error.problems
    return ()


def _out_problems(folders: Sequence[Path], images: Sequence[Path]) -> list[str]:
    standing = (next((path for path in (folder, *folder.parents) if path.exists()), folder) for folder in folders)
    files = sorted({path for path in standing if not path.is_dir()})
    problems = [f"--out: {path} is a file; expected a folder; name another." for path in files]
    written = {(folder / name).resolve() for folder in folders for name in (MASK, OVERLAY)}
    return problems + [
        f"--image {image}: would be replaced by the result; expected --out elsewhere; name another."
        for image in images
        if image.resolve() in written
    ]


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"--device {name!r} cannot be used ({first_line(error)}); expected cpu, cuda or cuda:N."
        ) from error
    return device


def _facts(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    # Without the images' folders, which may be named after patients.
    settings = {
        "checkpoint": arguments.checkpoint,
        "images": [image.name for image in arguments.image],
        "queries": arguments.query,
        "decode": arguments.decode,
        "max_new_tokens": arguments.max_new_tokens,
        "bits": arguments.bits,
        "device_map": arguments.device_map,
    }
    return run_facts(settings, seed=0, device=device)


def _folders(out: Path, images: Sequence[Path], queries: int) -> list[list[Path]]:
    """Returns where the answers go, for each image and query: stems that collide get a number."""
    if len(images) * queries == 1:
        return [[out]]
    taken = {RUN}
    folders = []
    for image in images:
        name, number = image.stem, 1
        while name.casefold() in taken:  # some file systems know no upper case
            number += 1
            name = f"{image.stem}-{number}"
        taken.add(name.casefold())
        folders.append([out / (f"{name}-{query}" if queries > 1 else name) for query in range(1, queries + 1)])
    return folders


def _no_region(model: MediSee) -> str:
    tokens = candidate_text(model.config.candidate_tokens)
    return f"No region: the model did not write {tokens}, so {MASK} is all zero. --decode forced asks for one always."


def _write(folder: Path, image_name: str, answer: Answer, decode: Decode, note: str) -> None:
    """Writes the three files, each atomically, prediction.json last."""
    height, width = answer.image.shape[:2]
    mask = answer.mask if answer.mask is not None else np.zeros((height, width), np.bool_)
    _save_png(folder / MASK, Image.fromarray(mask.astype(np.uint8) * 255))
    legend = "\n".join(part for part in (answer.question, answer.plain_text, note) if part)
    _save_png(folder / OVERLAY, overlay(answer.image, answer.mask, answer.box, legend=legend))
    content = {
        "image": image_name,
        "height": height,
        "width": width,
        "question": answer.question,
        "mode": _MODES[decode],
        "text": answer.text,
        "plain_text": answer.plain_text,
        "emitted": answer.emitted,
        "note": note,
        "box": answer.box,
        "mask": asdict(encode_mask(mask)) if answer.emitted else None,
        "scores": answer.scores,
    }
    write_json(folder / PREDICTION, content)


def _save_png(path: Path, picture: Image.Image) -> None:
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def _report(folder: Path, image_name: str, answer: Answer, note: str) -> str:
    lines = [f"{image_name}: {answer.question}", f"  {answer.plain_text or '(the model wrote nothing)'}"]
    if answer.mask is not None and answer.box is not None:
        box = ", ".join(f"{value:.1f}" for value in answer.box)
        share = 100 * answer.mask.mean()
        lines.append(f"  mask of {answer.mask.sum()} pixels ({share:.2g}% of the image), box ({box})")
    return "\n".join([*lines, *([f"  {note}"] if note else []), f"  -> {folder}"])


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
