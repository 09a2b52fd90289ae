"""Downloads published weights and records their SHA-256. Run it as

  python scripts/download_weights.py --list
  python scripts/download_weights.py medisee-7b --out weights             what configs/medisee_7b.yaml needs
  python scripts/download_weights.py llava-med@REVISION sam --out weights one model at a fixed revision, and another
  python scripts/download_weights.py --check --out weights                nothing changed since? needs no network

Each model is put into a folder of its name in OUT. An interrupted download is resumed, and what was downloaded is
compared with the hub's checksums. weights.json in OUT records size and SHA-256 of every file; a file that differs from
it later is an error and never silently accepted.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter
from tqdm import tqdm

from medisee.foundation.command_line import a_path, parse_words
from medisee.foundation.errors import InputError, exit_code, nearest
from medisee.foundation.files import inside, sha256, write_json
from medisee.foundation.json_files import parse_json
from medisee.foundation.output import filled_folder
from medisee.weights.hub import fetch, foreign_content, verify

MANIFEST = "weights.json"

_REVISION = re.compile(r"\w[\w./-]*")


@dataclass(frozen=True, slots=True)
class Weights:
    """Published weights. `repository` is None where the user has to download the file `manual` from `page`."""

    repository: str | None
    about: str
    page: str = ""
    manual: str = ""


WEIGHTS = {
    "llava-med": Weights(
        "microsoft/llava-med-v1.5-mistral-7b", "LLaVA-Med v1.5, Mistral 7B with its CLIP; model.mllm.source (15 GB)"
    ),
    "llava-v1.5": Weights("liuhaotian/llava-v1.5-7b", "LLaVA v1.5, Llama 7B; needs clip; model.mllm.source (14 GB)"),
    "clip": Weights("openai/clip-vit-large-patch14-336", "CLIP ViT-L/14 at 336; model.mllm.vision_source (2 GB)"),
    "medsam": Weights("wanglab/medsam-vit-base", "MedSAM ViT-B; model.seg_head.checkpoint (0.4 GB)"),
    "sam": Weights("facebook/sam-vit-base", "SAM ViT-B; model.seg_head.checkpoint (0.4 GB)"),
    "sam-med2d": Weights(
        None,
        "SAM-Med2D ViT-B at 256; model.seg_head.checkpoint (2.4 GB), downloaded by hand",
        page="https://github.com/OpenGVLab/SAM-Med2D",
        manual="sam-med2d_b.pth",
    ),
    "medisee": Weights("Carryyy/MediSee", "the authors' own MediSee checkpoint"),
}
"""What can be downloaded."""
SETS = {"medisee-7b": ("llava-med", "medsam"), "llava-7b": ("llava-v1.5", "clip", "medsam")}
"""Names for everything that one configuration needs."""


@dataclass(frozen=True, slots=True)
class FileNote:
    """SHA-256 of a downloaded file, and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class ModelNote:
    """A downloaded model: its repository or page, and its files by their path in OUT."""

    files: dict[str, FileNote]
    source: str = ""
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Notes:
    """The content of weights.json: a note for each downloaded model."""

    format: Literal[1]
    weights: dict[str, ModelNote]


def wanted(names: Sequence[str]) -> dict[str, str | None]:
    """Resolves sets and NAME@REVISION to models and their revisions."""
    found: dict[str, str | None] = {}
    problems = []
    for text in names:
        name, separator, revision = text.partition("@")
        members = SETS.get(name, (name,))
        if name not in SETS and name not in WEIGHTS:
            known = (*SETS, *WEIGHTS)
            problems.append(f"{text}: unknown weights; known are {', '.join(known)}.{nearest(name, known)}")
        elif separator and (name in SETS or not _REVISION.fullmatch(revision)):
            problems.append(f"{text}: expected a branch, tag or commit after the @ of one model, as in llava-med@main.")
        elif any(found.get(member, revision or None) != (revision or None) for member in members):
            problems.append(f"{text}: named in two revisions; name it once.")
        else:
            found |= dict.fromkeys(members, revision or None)
    if problems:
        raise InputError(problems)
    return found


def download(out: Path, models: Mapping[str, str | None]) -> list[str]:
    """Downloads models, given their revisions, and records each in the manifest; returns what is missing and why."""
    notes = read_manifest(out)
    missing: list[str] = []
    for name, revision in models.items():
        folder, weights = out / name, WEIGHTS[name]
        try:
            if weights.repository is not None:
                fetch(weights.repository, revision, folder)
                verify(weights.repository, revision, folder)
            elif not (folder / weights.manual).is_file():
                raise InputError(
                    f"{folder / weights.manual}: its authors offer it by a link only; "
                    f"open {weights.page}, save {weights.manual} there, and start again."
                )
            elif found := foreign_content(folder / weights.manual):
                raise InputError(f"{folder / weights.manual}: {found}; download it again from {weights.page}.")
            files = _hashed(out, folder)
            known = notes[name].files if name in notes else {}
            if changed := [file for file in files if file in known and known[file].sha256 != files[file].sha256]:
                raise InputError(
                    f"{out / file}: SHA-256 is {files[file].sha256}, but {MANIFEST} says {known[file].sha256}; delete "
                    f"the file and start again, or delete {name!r} from {MANIFEST} if its authors have changed it."
                    for file in changed
                )
        except InputError as error:
            missing += [f"missing {name}: {problem}" for problem in error.problems]
        except OSError as error:
            missing.append(f"missing {name}: {folder} cannot be read or written ({error}); correct --out.")
        else:
            notes[name] = ModelNote(files, weights.repository or weights.page, revision)
            write_json(out / MANIFEST, asdict(Notes(1, notes)))
            print(f"{name}: {len(files)} files in {folder}")
    return missing


def _hashed(out: Path, folder: Path) -> dict[str, FileNote]:
    # The hub keeps its own notes in hidden folders.
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    paths = sorted(path for name, path in files.items() if not any(part.startswith(".") for part in name.parts))
    return {
        path.relative_to(out).as_posix(): FileNote(sha256(path), path.stat().st_size)
        for path in tqdm(paths, desc=f"hashing {folder.name}", unit="file")
    }


def read_manifest(out: Path) -> dict[str, ModelNote]:
    """Returns what weights.json says of each model; nothing where there is no such file."""
    path = out / MANIFEST
    if not path.exists():
        return {}
    try:
        text = path.read_bytes()
        parse_json(text)  # refuses what pydantic's parser takes, such as a key that is twice in an object
        return TypeAdapter(Notes).validate_json(text, strict=True).weights
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a list of weights of format 1; delete it and download again.") from error


def check(out: Path, names: Sequence[str] = ()) -> int:
    """Compares the files of models or sets, or all, with the manifest; needs no network and returns their number."""
    notes = read_manifest(out)
    if not notes:
        found = "names no weights" if (out / MANIFEST).exists() else "is not there"
        raise InputError(f"{out / MANIFEST}: {found}; download some weights first, see --list.")
    chosen = list(wanted(names)) or list(notes)
    problems = [
        f"{out}: {name} was never downloaded here; run without --check." for name in chosen if name not in notes
    ]
    files = {file: note for name in chosen if name in notes for file, note in notes[name].files.items()}
    for file, note in tqdm(files.items(), desc="checking", unit="file"):
        path = inside(out, file, str(out / MANIFEST))
        if not path.is_file():
            problems.append(f"{path}: missing; download it again.")
        elif (size := path.stat().st_size) != note.size:
            problems.append(f"{path}: has {size} bytes instead of {note.size}; delete it and download it again.")
        elif (digest := sha256(path)) != note.sha256:
            problems.append(f"{path}: SHA-256 is {digest} instead of {note.sha256}; delete it and download it again.")
    if problems:
        raise InputError(problems)
    return len(files)


def main(argv: Sequence[str] | None = None) -> None:
    """Downloads or checks weights from the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", metavar="NAME[@REVISION]", help="models or sets; see --list")
    parser.add_argument("--out", type=a_path, default=Path("weights"), help="folder to write (default: weights)")
    parser.add_argument("--list", action="store_true", help="print the known weights and exit")
    parser.add_argument("--check", action="store_true", help="compare OUT with its weights.json; needs no network")
    arguments = parse_words(parser, argv, more="names")
    out: Path = arguments.out
    if arguments.list:
        print("models:")
        for name, weights in WEIGHTS.items():
            print(f"  {name:<12}{weights.repository or weights.page:<44}{weights.about}")
        print("sets:")
        for name, members in SETS.items():
            print(f"  {name:<12}{', '.join(members)}")
    elif arguments.check:
        print(f"done: {check(out, arguments.names)} files in {out} are as {MANIFEST} says")
    elif not arguments.names:
        raise InputError("no weights named; give one or more of those that --list prints, such as medisee-7b.")
    else:
        models = wanted(arguments.names)
        with filled_folder(out):
            if missing := download(out, models):
                raise InputError(missing)
        print(f"done: {', '.join(models)} in {out}; --check compares them with {MANIFEST} later")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
