"""Files damaged at random, two hundred per reader: each gives finite weights or a sentence, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gguf import TEXTS, tiny_llama, write_gguf

from medisee import MediSee
from medisee.config.model import Mllm, SegHeadConfig
from medisee.foundation.errors import InputError
from medisee.models.seg_head import sam_head
from medisee.weights.gguf import gguf_folder
from medisee.weights.tokenizer import train_tokenizer

COUNT = 200
VALUES: tuple[Any, ...] = (None, 0, -1, 3, 10**6, 1e300, "x", "", [], {}, [1], True)


def damaged(content: bytes, random: Random, end: int | None = None) -> bytes:
    """Flips some bytes before `end`, cuts the content, or doubles a piece of it."""
    place = random.randrange(end or len(content))
    kind = random.choice(("flip", "flip", "cut", "double"))
    if kind == "cut":
        return content[:place]
    if kind == "double":
        return content[:place] + content[max(0, place - 50) :]
    changed = bytearray(content)
    for _ in range(random.choice((1, 3, 30))):
        changed[random.randrange(end or len(content))] ^= random.randrange(1, 256)
    return bytes(changed)


def edited(content: bytes, random: Random) -> bytes:
    """Drops a key of an object in a JSON text, or gives it another value or name."""
    value = json.loads(content)
    objects: list[dict[str, Any]] = []
    stack: list[Any] = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, dict) and one:
            objects.append(one)
        stack += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
    chosen = random.choice(objects)
    key = random.choice(list(chosen))
    old = chosen.pop(key)
    if random.random() < 0.8:
        chosen[key if random.random() < 0.8 else key + "x"] = random.choice((*VALUES, old))
    return json.dumps(value).encode()


def outcome(load: Callable[[], torch.nn.Module]) -> str:
    """Loads, and tells how it ended: a sentence or two per problem, or a model whose weights are finite."""
    try:
        model = load()
    except InputError as error:
        assert error.problems and all(0 < len(one) < 900 and "\n" not in one for one in error.problems), error.problems
        return "refused"
    assert all(value.isfinite().all() for value in model.state_dict().values())
    return "loaded"


@pytest.fixture(scope="module")
def sharded(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint in two files with an index."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("mutated") / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {f"model-{half}.safetensors": sorted(tensors)[half::2] for half in (0, 1)}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    places = {name: file for file, names in parts.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def test_a_damaged_checkpoint_gives_finite_weights_or_a_sentence(sharded: Path) -> None:
    random, found = Random(0), []
    files = sorted(path for path in sharded.iterdir() if path.suffix in (".json", ".safetensors"))
    for number in range(COUNT):
        path = files[number % len(files)]
        whole = path.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little") if path.suffix == ".safetensors" and number % 4 else None
        text = path.suffix == ".json" and number % 3
        path.write_bytes(edited(whole, random) if text else damaged(whole, random, header))
        try:
            found.append(outcome(lambda: MediSee.from_pretrained(sharded)))
        finally:
            path.write_bytes(whole)
    assert {"loaded", "refused"} == set(found)
    assert outcome(lambda: MediSee.from_pretrained(sharded)) == "loaded"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_sam_gives_finite_weights_or_a_sentence(tmp_path: Path, zipped: bool) -> None:
    path, random, found = tmp_path / "sam.pth", Random(1), []
    torch.save(
        {"model": sam_head(SegHeadConfig(vit="micro", size=64)).state_dict(), "epoch": 1},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    whole = path.read_bytes()
    config = SegHeadConfig(vit="micro", size=64, checkpoint=str(path))
    for number in range(COUNT // 2):
        path.write_bytes(damaged(whole, random, None if number % 2 else 20_000))
        found.append(outcome(lambda: sam_head(config)))
    assert {"loaded", "refused"} == set(found)


def test_a_damaged_gguf_file_gives_finite_weights_or_a_sentence(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(len(tokenizer)), tokenizer)
    whole, random, found = path.read_bytes(), Random(2), []
    config = Mllm(source=str(path), image_tokens="seg_head", converted=str(tmp_path / "converted"))
    header = whole.index(b"token_embd") + 2000
    for _ in range(COUNT):
        path.write_bytes(damaged(whole, random, header))
        try:
            folder = gguf_folder(config)
        except InputError as error:
            assert len(error.problems) and "\n" not in error.problems[0]
            found.append("refused")
        else:
            assert all(value.isfinite().all() for value in load_file(folder / "model.safetensors").values())
            shutil.rmtree(folder)
            found.append("loaded")
    assert {"loaded", "refused"} == set(found)
