"""Downloads published weights and keeps their SHA-256. Run it as

  python scripts/download_weights.py --list
  python scripts/download_weights.py medisee-7b --out weights             what configs/medisee_7b.yaml needs
  python scripts/download_weights.py llava-med@REVISION sam --out weights a fixed revision, and another one
  python scripts/download_weights.py --check --out weights                nothing changed since? without a network

Each model becomes a folder of its name in OUT. A download that broke off goes on where it ended. weights.json in OUT holds
the size and SHA-256 of every file; a file that differs from it later is an error and never silently accepted.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medisee.foundation.errors import InputError, exit_code, nearest
from medisee.foundation.files import inside, sha256, write_json
from medisee.weights.hub import fetch

MANIFEST = "weights.json"
FORMAT = 1

_REVISION = re.compile(r"[\w][\w./-]*")


@dataclass(frozen=True, slots=True)
class Weights:
    """Published weights. `repository` is None where a person has to fetch `manual` from `page`."""

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
        "SAM-Med2D ViT-B at 256; model.seg_head.checkpoint (2.4 GB), fetched by hand",
        page="https://github.com/OpenGVLab/SAM-Med2D",
        manual="sam-med2d_b.pth",
    ),
    "medisee": Weights("Carryyy/MediSee", "the authors' own MediSee checkpoint"),
}
"""What can be asked for."""
SETS = {"medisee-7b": ("llava-med", "medsam"), "llava-7b": ("llava-v1.5", "clip", "medsam")}
"""Names for all that one configuration needs."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One model to fetch, and the revision that was asked for."""

    name: str
    revision: str | None


def wanted(names: Sequence[str]) -> list[Wanted]:
    """Resolves sets and NAME@REVISION, each model once.

    Raises:
        InputError: every unknown name, a revision of a set, one model in two revisions.
    """
    found: dict[str, str | None] = {}
    problems = []
    for text in names:
        name, separator, revision = text.partition("@")
        members = SETS.get(name, (name,))
        if name not in SETS and name not in WEIGHTS:
            known = (*SETS, *WEIGHTS)
            problems.append(f"{text}: unknown weights; known are {', '.join(known)}.{nearest(name, known)}")
        elif separator and (name in SETS or not _REVISION.fullmatch(revision)):
            problems.append(f"{text}: a branch, tag or commit stands behind the @ of one model; write llava-med@main.")
        elif any(found.get(member, revision or None) != (revision or None) for member in members):
            problems.append(f"{text}: asked for in two revisions; name it once.")
        else:
            found |= dict.fromkeys(members, revision or None)
    if problems:
        raise InputError(problems)
    return [Wanted(name, revision) for name, revision in found.items()]


def download(out: Path, models: Sequence[Wanted]) -> list[str]:
    """Fetches models one after the other, and notes their files in the manifest as they become complete.

    Args:
        out: folder of the models and of the manifest.
        models: what to fetch.

    Returns:
        What is missing, and why; the other models are there.

    Raises:
        InputError: the manifest is broken.
    """
    notes = read_manifest(out)
    missing: list[str] = []
    for model in models:
        folder, weights = out / model.name, WEIGHTS[model.name]
        try:
            if weights.repository is None:
                _by_hand(folder, weights)
            else:
                fetch(weights.repository, model.revision, folder)
            files = _hashed(out, folder)
            _compare(out, notes, model.name, files)
        except InputError as error:
            missing += [f"missing {model.name}: {problem}" for problem in error.problems]
            continue
        except OSError as error:
            missing.append(f"missing {model.name}: {folder} cannot be read or written ({error}); correct --out.")
            continue
        notes[model.name] = {"source": weights.repository or weights.page, "revision": model.revision, "files": files}
        write_json(out / MANIFEST, {"format": FORMAT, "weights": notes})
        print(f"{model.name}: {len(files)} files in {folder}")
    return missing


def _by_hand(folder: Path, weights: Weights) -> None:
    if not (folder / weights.manual).is_file():
        raise InputError(
            f"{folder / weights.manual}: its authors offer it by a link only; "
            f"open {weights.page}, save {weights.manual} there, and start again."
        )


def _hashed(out: Path, folder: Path) -> dict[str, dict[str, Any]]:
    # Behind a dot stand the hub's own notes on an unfinished download.
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder)))
    return {
        path.relative_to(out).as_posix(): {"sha256": sha256(path), "size": path.stat().st_size}
        for path in tqdm(paths, desc=f"hashing {folder.name}", unit="file")
    }


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _compare(out: Path, notes: dict[str, Any], name: str, files: dict[str, dict[str, Any]]) -> None:
    known = notes.get(name, {}).get("files", {})
    changed = [file for file, facts in files.items() if file in known and known[file]["sha256"] != facts["sha256"]]
    if changed:
        raise InputError(
            f"{out / file}: SHA-256 is {files[file]['sha256']}, but {MANIFEST} says {known[file]['sha256']}; delete the "
            f"file and start again, or delete {name!r} from {MANIFEST} if its authors have changed it."
            for file in changed
        )


def read_manifest(out: Path) -> dict[str, Any]:
    """Returns what weights.json says of each model; nothing where there is none.

    Raises:
        InputError: it cannot be read, or is of another format.
    """
    path = out / MANIFEST
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete it and download again.") from error
    weights = content.get("weights") if isinstance(content, dict) and content.get("format") == FORMAT else None
    if not isinstance(weights, dict) or not all(_is_note(note) for note in weights.values()):
        raise InputError(f"{path}: no list of weights of format {FORMAT}; delete it and download again.")
    return weights


def _is_note(note: Any) -> bool:
    files = note.get("files") if isinstance(note, dict) else None
    return isinstance(files, dict) and all(
        isinstance(facts, dict) and isinstance(facts.get("sha256"), str) and isinstance(facts.get("size"), int)
        for facts in files.values()
    )


def check(out: Path, names: Sequence[str] = ()) -> int:
    """Compares the files on disk with the manifest, without a network; returns how many there are.

    Args:
        out: folder of the manifest.
        names: models or sets to look at; none: all that the manifest names.

    Raises:
        InputError: every file that is missing or differs, every model that was never downloaded.
    """
    notes = read_manifest(out)
    if not notes:
        found = "names no weights" if (out / MANIFEST).exists() else "is not there"
        raise InputError(f"{out / MANIFEST}: {found}; expected downloaded weights; download some first, see --list.")
    chosen = [model.name for model in wanted(names)] or list(notes)
    problems = [
        f"{out}: {name} was never downloaded here; run without --check." for name in chosen if name not in notes
    ]
    files = {file: facts for name in chosen if name in notes for file, facts in notes[name]["files"].items()}
    for file, facts in tqdm(files.items(), desc="checking", unit="file"):
        path = inside(out, file, str(out / MANIFEST))
        if not path.is_file():
            problems.append(f"{path}: missing; download it again.")
        elif path.stat().st_size != facts["size"]:
            problems.append(
                f"{path}: has {path.stat().st_size} bytes instead of {facts['size']}; delete it and download it again."
            )
        elif (found := sha256(path)) != facts["sha256"]:
            problems.append(
                f"{path}: SHA-256 is {found} instead of {facts['sha256']}; delete it and download it again."
            )
    if problems:
        raise InputError(problems)
    return len(files)


def main(argv: Sequence[str] | None = None) -> None:
    """Downloads or checks weights from the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", metavar="NAME[@REVISION]", help="models or sets, see --list")
    parser.add_argument("--out", type=Path, default=Path("weights"), help="folder to write (default: weights)")
    parser.add_argument("--list", action="store_true", help="print what there is, and end")
    parser.add_argument("--check", action="store_true", help="compare OUT with its weights.json; needs no network")
    arguments = parser.parse_args(argv)
    out: Path = arguments.out
    if arguments.list:
        print(_listing())
    elif arguments.check:
        print(f"done: {check(out, arguments.names)} files in {out} are as {MANIFEST} says")
    elif not arguments.names:
        raise InputError("no weights named; give one or more of those that --list prints, such as medisee-7b.")
    else:
        _download(out, arguments.names)


def _download(out: Path, names: Sequence[str]) -> None:
    models = wanted(names)
    standing = next((path for path in (out, *out.parents) if path.exists()), out)
    if not standing.is_dir():
        raise InputError(f"--out {out}: {standing} is a file; expected a folder; name another.")
    if missing := download(out, models):
        raise InputError(missing)
    print(f"done: {', '.join(model.name for model in models)} in {out}; --check compares them with {MANIFEST} later")


def _listing() -> str:
    lines = ["models:"]
    lines += [
        f"  {name:<12}{weights.repository or weights.page:<44}{weights.about}" for name, weights in WEIGHTS.items()
    ]
    lines.append("sets:")
    lines += [f"  {name:<12}{', '.join(members)}" for name, members in SETS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
