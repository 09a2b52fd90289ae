"""Original LLaVA checkpoints: converted to the same numbers, in little memory, completely or not at all."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from original_checkpoint import OriginalCheckpoint, clip_shapes, original_shapes, random_tensors
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from medisee.config.model import Mllm
from medisee.foundation.errors import InputError
from medisee.models.mllm import load_mllm, load_tokenizer
from medisee.models.seg_head import SegHeadSpec
from medisee.weights import llava_convert, shards
from medisee.weights.llava_convert import converted
from medisee.weights.tokenizer import token_id

MakeOriginal = Callable[..., OriginalCheckpoint]

SPEC = SegHeadSpec(size=64, resize="longest", pixels="minmax", channels=32, grid=4)
CANDIDATES = ("[SEG]", "[BBOX]")
SHARD = "model-00002-of-00004"


def mllm(checkpoint: OriginalCheckpoint, **changes: Any) -> Mllm:
    home = checkpoint.folder.parent / "converted"
    values = {"source": str(checkpoint.folder), "converted": str(home), "vision_size": 28, "train": "frozen"}
    return Mllm.model_validate(values | changes)


def load(config: Mllm) -> Any:
    return load_mllm(config, load_tokenizer(config, CANDIDATES), SPEC).eval()


def by_hand(tensors: dict[str, Tensor], language: str, theta: float) -> Any:
    """A transformers Llava with the same tensors, whose names are written out a second time."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=28,
        patch_size=14,
        hidden_act="quick_gelu",
    )
    sizes: dict[str, Any] = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }
    text = MistralConfig(**sizes, sliding_window=None) if language == "mistral" else LlamaConfig(**sizes)
    llava = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=399))
    state = {}
    for name, value in tensors.items():
        if name.endswith(("inv_freq", "position_ids")):
            continue
        new = name.replace("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.")
        new = new.replace("mm_projector.0", "multi_modal_projector.linear_1")
        new = new.replace("mm_projector.2", "multi_modal_projector.linear_2")
        if new.split(".")[1] in ("embed_tokens", "layers", "norm"):
            new = new.replace("model.", "model.language_model.", 1)
        state[new] = value.float()
    llava.load_state_dict(state, strict=True)
    return llava.eval()


@torch.no_grad()
def logits(llava: Any, image_id: int) -> Tensor:
    torch.manual_seed(3)
    pixels = torch.randn(1, 3, 28, 28)
    ids = torch.cat([torch.tensor([[1]]), torch.full((1, 4), image_id), torch.arange(260, 300)[None]], dim=1)
    return llava(input_ids=ids, pixel_values=pixels.to(llava.dtype)).logits[..., :400].float()


@pytest.mark.parametrize("shards", [4, 1])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(("language", "theta"), [("mistral", 1e6), ("llama", 1e4)])
def test_logits_are_those_of_a_llava_built_by_hand(
    make_original: MakeOriginal, language: str, theta: float, kind: str, shards: int
) -> None:
    checkpoint = make_original(language, kind=kind, shards=shards)
    config = mllm(checkpoint)
    tokenizer = load_tokenizer(config, CANDIDATES)
    llava: Any = load_mllm(config, tokenizer, SPEC).eval()
    expected = logits(by_hand(checkpoint.tensors, language, theta), 399)
    torch.testing.assert_close(logits(llava, token_id(tokenizer, "<image>")), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1
    text = llava.config.text_config
    assert (text.model_type, text.rope_parameters["rope_theta"]) == (language, theta)
    assert getattr(text, "sliding_window", None) is None


def test_the_rotary_base_of_the_file_wins_and_its_sliding_window_does_not(make_original: MakeOriginal) -> None:
    checkpoint = make_original()
    checkpoint.configure(rope_theta=5e5, sliding_window=4)
    llava = load(mllm(checkpoint))
    assert llava.config.text_config.rope_parameters["rope_theta"] == 5e5
    assert llava.config.text_config.sliding_window is None
    expected = logits(by_hand(checkpoint.tensors, "mistral", 5e5), 399)
    torch.testing.assert_close(logits(llava, 402), expected, rtol=1e-5, atol=1e-5)


def test_new_tokens_stand_behind_the_vocabulary_and_old_rows_stay(make_original: MakeOriginal) -> None:
    checkpoint = make_original()
    config = mllm(checkpoint)
    tokenizer = load_tokenizer(config, CANDIDATES)
    assert [token_id(tokenizer, token) for token in (*CANDIDATES, "<image>")] == [400, 401, 402]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    llava: Any = load_mllm(config, tokenizer, SPEC)
    for layer, name in ((llava.get_input_embeddings(), "model.embed_tokens"), (llava.lm_head, "lm_head")):
        old = checkpoint.tensors[f"{name}.weight"]
        assert torch.equal(layer.weight[:400], old)
        torch.testing.assert_close(layer.weight[400:], old.mean(dim=0).expand(3, -1))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_bytes_and_types_are_kept(make_original: MakeOriginal, kind: str) -> None:
    checkpoint = make_original(kind=kind, dtype=torch.bfloat16)
    folder = converted(checkpoint.folder, mllm(checkpoint))
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"
    with safe_open(folder / places["model.vision_tower.encoder.layers.1.mlp.fc1.weight"], "pt") as shard:
        assert torch.equal(
            shard.get_tensor("model.vision_tower.encoder.layers.1.mlp.fc1.weight"), checkpoint.tensors[name]
        )
    assert load(mllm(checkpoint)).model.language_model.norm.weight.dtype == torch.bfloat16
    assert load(mllm(checkpoint, dtype="float32")).model.language_model.norm.weight.dtype == torch.float32


def write_clip(folder: Path, start: str = "vision_model.") -> dict[str, Tensor]:
    """CLIP as OpenAI publishes it: both sides in one .bin."""
    folder.mkdir()
    tensors = random_tensors(clip_shapes(start))
    other = {"logit_scale": torch.ones(()), "text_projection.weight": torch.ones(4, 4)}
    other |= {"visual_projection.weight": torch.ones(4, 64), "text_model.final_layer_norm.bias": torch.ones(4)}
    torch.save(
        tensors | other | {f"{start}embeddings.position_ids": torch.arange(5)[None]}, folder / "pytorch_model.bin"
    )
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "hidden_act": "gelu"}
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": sizes}))
    return tensors


@pytest.mark.parametrize("start", ["vision_model.", ""])
def test_a_checkpoint_without_vision_tower_takes_clip(make_original: MakeOriginal, tmp_path: Path, start: str) -> None:
    checkpoint = make_original("llama", vision=False)
    clip = write_clip(tmp_path / "clip", start)
    llava = load(mllm(checkpoint, vision_source=str(tmp_path / "clip")))
    for name, value in clip.items():
        assert torch.equal(llava.get_parameter("model.vision_tower." + name.removeprefix(start)), value)
    vision = llava.config.vision_config
    assert (vision.num_attention_heads, vision.hidden_act, vision.image_size) == (2, "gelu", 28)


def test_the_vision_tower_comes_from_the_hub_id_that_config_json_names(
    make_original: MakeOriginal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_original("llama", vision=False)
    write_clip(tmp_path / "clip")
    requested = []
    monkeypatch.setattr(llava_convert, "fetch", lambda name, **_: requested.append(name) or tmp_path / "clip")
    load(mllm(checkpoint))
    assert requested == ["openai/clip-vit-large-patch14-336"]


def test_a_vision_tower_out_of_reach_is_an_input_error(
    make_original: MakeOriginal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(name: str, **_: Any) -> Path:
        raise InputError(f"{name}: cannot be fetched: no network.")

    monkeypatch.setattr(llava_convert, "fetch", nothing)
    with pytest.raises(InputError, match=r"clip-vit-large.*no network.*download_weights\.py clip.*vision_source"):
        load(mllm(make_original("llama", vision=False)))


def test_a_conversion_is_kept_and_another_content_is_another_one(make_original: MakeOriginal) -> None:
    checkpoint = make_original()
    config = mllm(checkpoint)
    first = converted(checkpoint.folder, config)
    written = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    assert converted(checkpoint.folder, config) == first
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == written
    changed = {**checkpoint.tensors, "model.norm.weight": 2 * checkpoint.tensors["model.norm.weight"]}
    checkpoint.write(changed)
    second = converted(checkpoint.folder, config)
    assert second != first
    checkpoint.configure(rope_theta=2e6)
    assert converted(checkpoint.folder, config) not in (first, second)


def test_an_interrupted_conversion_leaves_nothing_that_looks_complete(
    make_original: MakeOriginal, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_original()
    config = mllm(checkpoint)
    write, done = shards.write_shard, []

    def third_fails(path: Path, *rest: Any) -> None:
        done.append(path)
        if len(done) == 3:
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(shards, "write_shard", third_fails)
    with pytest.raises(KeyboardInterrupt):
        converted(checkpoint.folder, config)
    home = checkpoint.folder.parent / "converted"
    assert [path.name for path in home.iterdir() if path.is_dir()] == []
    monkeypatch.setattr(shards, "write_shard", write)
    assert load(config) is not None


def test_what_a_killed_conversion_left_is_removed(make_original: MakeOriginal) -> None:
    checkpoint = make_original()
    config = mllm(checkpoint)
    folder = converted(checkpoint.folder, config)
    left = folder.with_name(f".{folder.name}.1234.tmp")
    folder.rename(left)
    assert converted(checkpoint.folder, config) == folder
    assert not left.exists()


def renamed(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {new if name == old else name: value for name, value in tensors.items()}


def problems(checkpoint: OriginalCheckpoint, **changes: Any) -> tuple[str, ...]:
    """What is said; nothing must have been written."""
    with pytest.raises(InputError) as caught:
        load(mllm(checkpoint, **changes))
    home = checkpoint.folder.parent / "converted"
    assert not home.exists() or not [path for path in home.iterdir() if path.is_dir()]
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_truncated_shard(make_original: MakeOriginal, kind: str) -> None:
    checkpoint = make_original(kind=kind)
    path = next(checkpoint.folder.glob(f"*-00002-of-00004.{kind}"))
    path.write_bytes(path.read_bytes()[:-100])
    (found,) = problems(checkpoint)
    assert path.name in found
    assert "truncated" in found


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("content", [b"", b"<!doctype html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_foreign_file(make_original: MakeOriginal, kind: str, content: bytes) -> None:
    checkpoint = make_original(kind=kind)
    path = next(checkpoint.folder.glob(f"*-00002-of-00004.{kind}"))
    path.write_bytes(content)
    (found,) = problems(checkpoint)
    assert path.name in found


def test_two_missing_shards_are_named_together(make_original: MakeOriginal) -> None:
    checkpoint = make_original()
    for number in (2, 3):
        (checkpoint.folder / f"model-0000{number}-of-00004.safetensors").unlink()
    (found,) = problems(checkpoint)
    assert f"{SHARD}.safetensors, model-00003-of-00004.safetensors" in found


def test_a_renamed_key_is_both_left_over_and_missing(make_original: MakeOriginal) -> None:
    checkpoint = make_original()
    old = "model.layers.1.self_attn.q_proj.weight"
    checkpoint.write(renamed(checkpoint.tensors, old, "model.layers.1.self_attn.query.weight"))
    missing, left_over = problems(checkpoint)
    assert "model.layers.1.self_attn.query.weight" in left_over
    assert old in missing


def test_a_key_of_no_known_kind(make_original: MakeOriginal) -> None:
    checkpoint = make_original()
    checkpoint.write({**checkpoint.tensors, "model.image_newline": torch.ones(32)})
    (found,) = problems(checkpoint)
    assert "model.image_newline" in found


def test_wrong_shapes_are_all_named_with_both_shapes(make_original: MakeOriginal) -> None:
    checkpoint = make_original()
    wrong = {"model.norm.weight": torch.ones(31), "model.mm_projector.0.weight": torch.ones(32, 65)}
    checkpoint.write({**checkpoint.tensors, **wrong})
    found = "\n".join(problems(checkpoint))
    assert "model.norm.weight has shape (31,), expected (32,)" in found
    assert "model.mm_projector.0.weight has shape (32, 65), expected (32, 64)" in found


@pytest.mark.parametrize(("stated", "rows"), [(401, 400), (500, 500)])
def test_a_wrong_vocabulary(make_original: MakeOriginal, stated: int, rows: int) -> None:
    checkpoint = make_original()
    larger = {name: torch.ones(rows, 32) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    checkpoint.write({**checkpoint.tensors, **larger})
    checkpoint.configure(vocab_size=stated)
    found = "\n".join(problems(checkpoint))
    assert (f"vocab_size is {stated}, but the embedding has {rows} rows" in found) == (stated != rows)
    assert (f"tokenizer has 400 tokens, but the embedding has {rows} rows" in found) == (rows == 500)


class Code:
    """Pickled code that makes a file when it is run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_not_run(make_original: MakeOriginal, tmp_path: Path, zipped: bool) -> None:
    checkpoint = make_original(kind="bin")
    path = next(checkpoint.folder.glob("*-00002-of-00004.bin"))
    if zipped:
        torch.save({"model.norm.weight": Code(tmp_path / "ran")}, path)
    else:
        path.write_bytes(pickle.dumps({"model.norm.weight": Code(tmp_path / "ran")}, protocol=2))
    (found,) = problems(checkpoint)
    assert path.name in found
    assert "none of it was executed" in found
    assert not (tmp_path / "ran").exists()


def test_a_tensor_in_the_wrong_shard(make_original: MakeOriginal) -> None:
    checkpoint = make_original()
    index = checkpoint.folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    places = content["weight_map"]
    places["model.norm.weight"] = next(file for file in places.values() if file != places["model.norm.weight"])
    index.write_text(json.dumps(content))
    found = problems(checkpoint)
    assert len(found) == 2
    assert all("model.norm.weight" in problem for problem in found)


def test_two_damaged_shards_are_reported_together(make_original: MakeOriginal) -> None:
    checkpoint = make_original()
    for number in (1, 4):
        (checkpoint.folder / f"model-0000{number}-of-00004.safetensors").write_bytes(b"no")
    assert len(problems(checkpoint)) == 2


def test_a_quantized_checkpoint_is_refused(make_original: MakeOriginal) -> None:
    checkpoint = make_original()
    checkpoint.write({**checkpoint.tensors, "model.norm.weight": torch.ones(32, dtype=torch.int8)})
    (found,) = problems(checkpoint)
    assert "model.norm.weight holds int8 numbers" in found


@pytest.mark.parametrize(
    "change",
    [
        {"mm_projector_type": "linear"},
        {"mm_use_im_start_end": True},
        {"hidden_size": None},
        {"tie_word_embeddings": True},
    ],
)
def test_another_kind_of_llava_is_refused(make_original: MakeOriginal, change: dict[str, Any]) -> None:
    checkpoint = make_original()
    checkpoint.configure(**change)
    (found,) = problems(checkpoint)
    assert next(iter(change)) in found
    assert "config.json" in found


def test_a_folder_without_tokenizer(make_original: MakeOriginal) -> None:
    checkpoint = make_original()
    (checkpoint.folder / "tokenizer.model").unlink()
    (found,) = problems(checkpoint)
    assert "tokenizer.model" in found


def test_a_folder_that_cannot_be_written(make_original: MakeOriginal, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (found,) = problems(make_original(), converted=str(tmp_path / "file" / "below"))
    assert "model.mllm.converted" in found


def test_no_room_is_reported_before_anything_is_written(
    make_original: MakeOriginal, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(llava_convert.shutil, "disk_usage", lambda _: usage)
    (found,) = problems(make_original())
    assert "make room" in found


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from medisee.config.model import Mllm
from medisee.weights.llava_convert import converted

def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096

folder = Path(sys.argv[1])
baseline, peak, running = resident(), 0, True

def watch():
    global peak
    while running:
        peak = max(peak, resident())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
converted(folder, Mllm(source=str(folder), converted=str(folder.parent / "converted")))
running = False
thread.join()
print(baseline, peak)
"""


@pytest.mark.scale
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_memory_stays_within_one_shard(make_original: MakeOriginal, tmp_path: Path, kind: str) -> None:
    """Four shards of 100 MB; a small conversion first, so that libraries are not counted."""
    checkpoint = make_original(kind=kind)
    sizes = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 15}
    shapes = original_shapes(rows=400, vision=True, width=1024, wide=3584, layers=15)
    tensors = random_tensors(shapes, torch.bfloat16)
    large = OriginalCheckpoint(tmp_path / "large", tensors, checkpoint.settings)
    large.folder.mkdir()
    large.configure(**sizes)
    (large.folder / "tokenizer.model").write_bytes((checkpoint.folder / "tokenizer.model").read_bytes())
    large.write(kind=kind)
    del tensors
    largest = max(path.stat().st_size for path in large.folder.glob(f"*.{kind}"))
    warm = f"converted(Path({str(checkpoint.folder)!r}), Mllm(source='x', converted={str(tmp_path / 'warm')!r}))\n"
    program = MEASURE.replace("baseline, peak", warm + "baseline, peak", 1)
    done = subprocess.run(
        [sys.executable, "-c", program, str(large.folder)], capture_output=True, text=True, check=True, timeout=600
    )
    baseline, peak = map(int, done.stdout.split())
    print(f"{kind}: peak {(peak - baseline) / 1e6:.1f} MB above the baseline, largest shard {largest / 1e6:.1f} MB")
    assert largest > 80e6
    assert peak - baseline <= 1.3 * largest
