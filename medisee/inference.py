"""Asks a model about images. Run it as

  python scripts/inference.py --checkpoint runs/demo/checkpoint --image slice.png \\
      --query "Which structure relays almost all sensory information to the cortex?" --out runs/answer

For each image and query, writes mask.png (0 and 255, of the image's size), overlay.png and prediction.json (with the
mask as COCO RLE): into OUT itself for one image and one query, otherwise into OUT/<image>[-<number of the query>]/.
OUT/run.json records how they were made. If the model writes no [SEG] and [BBOX], mask.png is all zero. With --decode
forced it is given the answer "It is [SEG] and [BBOX]." instead: a region for every query, but no explanation.

--plan prints what a checkpoint or a configuration needs, without image, query or weights.
From Python: model = MediSee.from_pretrained(folder), then ask(model, image, query).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from medisee.config import Eval
from medisee.evaluation.drawing import overlay
from medisee.foundation.command_line import a_path, parse_words
from medisee.foundation.errors import InputError, exit_code, first_line
from medisee.foundation.files import atomic_path, safe_name, write_json
from medisee.foundation.output import Result, check_output, locked
from medisee.records.images import read_image
from medisee.records.masks import Box, encode_mask
from medisee.records.prompts import candidate_text
from medisee.weights.hub import is_hub_id

# torch, transformers and peft take many seconds to import: each function imports what needs them, so that bad arguments
# are refused at once.
if TYPE_CHECKING:
    import torch

    from medisee.evaluation.prediction import Mode
    from medisee.models.medisee import MediSee

Decode = Literal["generate", "forced"]
MAX_NEW_TOKENS = Eval().max_new_tokens
MASK, OVERLAY, PREDICTION, RUN = "mask.png", "overlay.png", "prediction.json", "run.json"

_ANSWER = Result("answer", f"{MASK}|{OVERLAY}|{PREDICTION}", PREDICTION, "plain_text")
_RUN = Result("answer", RUN, RUN, "settings.queries")
_MODES: dict[Decode, Mode] = {"generate": "generated", "forced": "forced"}
_KEPT_BYTES = 1 << 28  # of pixels of checked images that are kept; images beyond it are read again


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """What the model says about one image and one query."""

    image: NDArray[np.uint8]  # (H, W, 3), RGB, as it was read
    question: str
    text: str  # what the model wrote, with its candidate tokens
    plain_text: str  # the same for people
    emitted: bool  # whether the model wrote all candidate tokens, that is, whether it marks a region
    mask: NDArray[np.bool_] | None  # (H, W); None when nothing was emitted, and so is the box
    box: Box | None  # half-open xyxy in pixels of the image
    scores: dict[str, float]  # `mask_confidence`: mean probability inside the mask; empty when nothing was emitted


def ask(
    model: MediSee,
    image: Path | str | NDArray[np.uint8],
    query: str,
    *,
    page: int | None = None,
    decode: Decode = "generate",
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Answer:
    """Asks one query about one image; see `ask_all`."""
    return ask_all(model, image, [query], page=page, decode=decode, max_new_tokens=max_new_tokens)[0]


def ask_all(
    model: MediSee,
    image: Path | str | NDArray[np.uint8],
    queries: Sequence[str],
    *,
    page: int | None = None,
    decode: Decode = "generate",
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[Answer]:
    """Asks queries about one image in one pass; returns one answer per query, independent of the others, in order.

    The model is in evaluation mode, as `MediSee.from_pretrained` returns it. The image is a PNG, JPEG or TIFF file, of
    which `page` names one of several pages, or pixels (H, W, 3) uint8, RGB. With `generate` the model writes its answer,
    of at most `max_new_tokens`; with `forced` it is given the answer and always marks a region.

    Raises:
        InputError: the image cannot be read or has another form, there is no query, or one is empty or too long.
    """
    from medisee.evaluation.prediction import answer_examples
    from medisee.models.processing import Example, Query

    if isinstance(image, (str, Path)):
        image = read_image(image, page)
    elif image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise InputError(f"image: expected pixels (H, W, 3) of uint8, got {image.shape} of {image.dtype}; convert it.")
    if problems := _query_problems(queries):
        raise InputError(problems)
    asked = tuple(Query(record="image", target=f"query {n}", question=q) for n, q in enumerate(queries, 1))
    example = Example(image, image.shape[0], image.shape[1], asked)
    answers = answer_examples(model, [example], _MODES[decode], Eval(max_new_tokens=max_new_tokens))
    return [
        Answer(
            image=image,
            question=query,
            text=one.text,
            plain_text=plain_text(one.text, model.config.candidate_tokens),
            emitted=one.emitted,
            mask=one.mask,
            box=one.box,
            scores=one.scores,
        )
        for query, one in zip(queries, answers, strict=True)
    ]


def plain_text(text: str, tokens: Sequence[str]) -> str:
    """Returns an answer for people: "It is [SEG] and [BBOX]. It makes bile." -> "It is this region. It makes bile."

    `tokens` are the candidate tokens. Line breaks and terminal control characters become spaces.
    """
    token = "|".join(map(re.escape, tokens))
    listed = re.sub(rf"(?:{token})(?:(?:,|\s|\band\b)*(?:{token}))*", "this region", text)
    return " ".join("".join(c if c.isprintable() else " " for c in listed).split())


def _query_problems(queries: Sequence[str]) -> list[str]:
    problems = [] if queries else ["no query; give one or more."]
    for number, query in enumerate(queries, 1):
        if not query.strip():
            problems.append(f"query {number} {query!r} has no text; ask something.")
        elif any("\ud800" <= character <= "\udfff" for character in query):
            problems.append(f"query {number} {query!r} is not valid Unicode; give UTF-8 text.")
    return problems


def main(argv: Sequence[str] | None = None) -> None:
    """Answers queries about images from the command line."""
    if "--plan" in (sys.argv[1:] if argv is None else argv):
        print(_plan(argv), end="")
        return
    arguments = parse_words(_parser(), argv)
    folders = _folders(arguments.out, arguments.image, len(arguments.query))
    checkpoint, device, images = _checked(arguments, [folder for its in folders for folder in its])

    from medisee.foundation.provenance import run_facts
    from medisee.models.medisee import MediSee
    from medisee.weights.checkpoints import load_checkpoint

    started = time.perf_counter()
    model = load_checkpoint(checkpoint, MediSee, bits=arguments.bits, device_map=arguments.device_map)
    device = device if arguments.device is not None else model.pinned_device or device
    model.placed(device).eval()
    choices = {"page": arguments.page, "decode": arguments.decode, "max_new_tokens": arguments.max_new_tokens}
    # Without the images' folders, which may be named after patients.
    names = [path.name for path in arguments.image]
    settings = {"checkpoint": arguments.checkpoint, "images": names, "queries": arguments.query, **choices}
    settings |= {"bits": arguments.bits, "device_map": arguments.device_map}
    facts = run_facts(settings, seed=0, device=device)
    tokens = candidate_text(model.config.candidate_tokens)
    no_region = f"No region: the model did not write {tokens}, so {MASK} is all zero; --decode forced always marks one."
    marked = 0
    disable = None if len(images) > 1 else True  # None: a progress bar on a terminal only
    progress = tqdm(images, desc="images", unit="image", disable=disable)
    with locked(arguments.out):
        for image, name, its in zip(progress, names, folders, strict=True):
            for folder, answer in zip(its, ask_all(model, image, arguments.query, **choices), strict=True):
                note = "" if answer.emitted else no_region
                _write(folder, name, answer, arguments.decode, note)
                tqdm.write(_report(folder, name, answer, note))
                marked += answer.emitted
        write_json(arguments.out / RUN, {**facts, "seconds": round(time.perf_counter() - started, 3)})
    print(f"done: {sum(map(len, folders))} answer(s), {marked} with a region, in {arguments.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=expanduser, required=True, metavar="DIR", help="folder that training wrote, or a hub id")
    several = {"required": True, "nargs": "+", "action": "extend"}
    add("--image", type=a_path, metavar="F", help="PNG, JPEG or TIFF files", **several)
    add("--page", type=int, metavar="N", help="page of an image file that has several, from 0")
    add("--query", metavar="TEXT", help="questions, each in quotes; each is asked about each image", **several)
    add("--out", type=a_path, required=True, metavar="OUT", help="folder for the results; earlier results are replaced")
    decode_help = "generate: the model writes its answer (default); forced: a fixed answer that always marks a region"
    add("--decode", choices=get_args(Decode), default="generate", help=decode_help)
    longest = f"longest answer (default: {MAX_NEW_TOKENS})"
    add("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N", help=longest)
    add("--device", help="such as cpu or cuda:1 (default: the first GPU, or the CPU where there is none)")
    published = "for checkpoints that build on published weights (default: as in training)"
    add("--bits", type=int, choices=(4, 8), help=f"hold the language model in 4 or 8 bits (NVIDIA GPU); {published}")
    add("--device-map", choices=("auto",), help=f"spread the language model over all GPUs and main memory; {published}")
    add("--plan", action="store_true", help="print memory and arithmetic instead; see --plan --help")
    return parser


def _plan(argv: Sequence[str] | None) -> str:
    """Plans inference of a checkpoint or a configuration; needs neither image nor query."""
    from medisee.config.load import load_config
    from medisee.planning.plan import GPU, checkpoint_config, plan_inference, render_inference_plan

    parser = argparse.ArgumentParser(prog=f"{Path(sys.argv[0]).name} --plan")
    parser.description = "Prints parameters, memory, arithmetic and missing files."
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=a_path, metavar="DIR", help="folder that training wrote")
    model.add_argument("--config", metavar="C", help="YAML run; its files may be missing")
    parser.add_argument("--plan", action="store_true", help="print the plan and exit")
    parser.add_argument("--gpu", default=GPU, metavar="NAME", help=f"such as rtx4090 (default: {GPU})")
    arguments = parse_words(parser, argv)
    config = checkpoint_config(arguments.checkpoint) if arguments.checkpoint else load_config(arguments.config)
    return render_inference_plan(plan_inference(config, gpu=arguments.gpu))


def _checked(
    arguments: argparse.Namespace, folders: Sequence[Path]
) -> tuple[Path, torch.device, list[Path | NDArray[np.uint8]]]:
    """Checks all inputs before the model is loaded."""
    problems = _query_problems(arguments.query)
    *words, last = arguments.query
    ends = tuple("?.!")
    if words and last.isascii() and last.endswith(ends) and not any(" " in one or one.endswith(ends) for one in words):
        problems.append(f"--query {shlex.join(arguments.query)}: single words; put the question in double quotes.")
    if arguments.max_new_tokens < 1:
        problems.append(f"--max-new-tokens is {arguments.max_new_tokens}; expected 1 or more.")

    @contextmanager
    def collected() -> Iterator[None]:
        try:
            yield
        except InputError as error:
            problems.extend(error.problems)

    images: list[Path | NDArray[np.uint8]] = []
    size = 0
    for path in arguments.image:
        with collected():
            pixels = read_image(path, arguments.page)
            size += pixels.nbytes
            images.append(pixels if size <= _KEPT_BYTES else path)
    written = {os.path.realpath(folder / name) for folder in folders for name in (MASK, OVERLAY)}
    replaced = [image for image in arguments.image if os.path.realpath(image) in written]
    problems += [f"--image {image}: would be replaced by the result; choose another --out." for image in replaced]
    if not replaced:
        with collected():
            check_output(arguments.out, _RUN, inputs={"the checkpoint": arguments.checkpoint})
            for folder in folders:
                check_output(folder, _ANSWER)
    checkpoint = device = None
    if arguments.device is not None or not problems:
        with collected():
            device = _device(arguments.device)
    # What reads a checkpoint takes seconds to import. With other problems it is imported only where there obviously is
    # no checkpoint, and nothing is fetched from the hub.
    if not problems or not ((Path(arguments.checkpoint) / "config.json").is_file() or is_hub_id(arguments.checkpoint)):
        from medisee.weights.checkpoints import local_checkpoint, read_description

        with collected():
            checkpoint = local_checkpoint(arguments.checkpoint)
            read_description(checkpoint)
    if problems or checkpoint is None or device is None:
        raise InputError(problems)
    return checkpoint, device, images


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        problem = f"--device {name!r} cannot be used ({first_line(error)}); expected cpu, cuda or cuda:N."
        raise InputError(problem) from error
    return device


def _folders(out: Path, images: Sequence[Path], queries: int) -> list[list[Path]]:
    """Returns the folder of each image's answers, one per query; names that collide get a number."""
    if len(images) * queries == 1:
        return [[out]]
    taken = {RUN}
    folders = []
    for image in images:
        name = safe_name(image.stem, taken)
        folders.append([out / (f"{name}-{query}" if queries > 1 else name) for query in range(1, queries + 1)])
    return folders


def _write(folder: Path, image_name: str, answer: Answer, decode: Decode, note: str) -> None:
    """Writes the three files, each atomically and at the same moment, prediction.json last."""
    height, width = answer.image.shape[:2]
    mask = answer.mask if answer.mask is not None else np.zeros((height, width), np.bool_)
    legend = "\n".join(part for part in (answer.question, answer.plain_text, note) if part)
    drawn = overlay(answer.image, answer.mask, answer.box, legend=legend)
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
    with ExitStack() as files:  # it is left in reverse order
        paths = [files.enter_context(atomic_path(folder / name)) for name in (PREDICTION, OVERLAY, MASK)]
        write_json(paths[0], content)
        drawn.save(paths[1], format="PNG")
        Image.fromarray(mask.astype(np.uint8) * 255).save(paths[2], format="PNG")


def _report(folder: Path, image_name: str, answer: Answer, note: str) -> str:
    lines = [f"{image_name}: {answer.question}", f"  {answer.plain_text or '(the model wrote nothing)'}"]
    if answer.mask is not None and answer.box is not None:
        box = ", ".join(f"{value:.1f}" for value in answer.box)
        share = 100 * answer.mask.mean()
        lines.append(f"  mask of {answer.mask.sum()} pixels ({share:.2g}% of the image), box ({box})")
    return "\n".join([*lines, *([f"  {note}"] if note else []), f"  -> {folder}"])


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
