"""A Llava on this machine as the captioner: built tiny, with random weights, and asked through a whole run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from data_gen import run
from data_gen.authors.captioner import LocalCaptioner
from data_gen.core.pictures import identify
from data_gen.core.prompts import MAX_TOKENS, request
from data_gen.ledger.ledger import Ledger
from medisee.foundation.errors import InputError
from medisee.weights.tokenizer import add_candidate_tokens, token_id, train_tokenizer

FACTS = {"item": "r", "modality": "ct", "category": "liver", "box": [0, 0, 1, 1], "template": "first"}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava") / "tiny"
    tokenizer = train_tokenizer(["[INST] A slice of the belly. [/INST] This is one image of the kind: ct."], 400)
    add_candidate_tokens(tokenizer, ())
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=28, patch_size=14),
        text_config=MistralConfig(
            **sizes, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=4096
        ),
        image_token_index=token_id(tokenizer, "<image>"),
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_captions_are_json_and_the_same_every_time(llava: Path, tmp_path: Path) -> None:
    Image.new("L", (40, 24), 90).save(tmp_path / "a.png")
    asked = request("caption", FACTS, model="local:tiny", image=identify(tmp_path, "a.png"))
    captioner = LocalCaptioner(str(llava), tmp_path)
    first, second = (asyncio.run(captioner.send(asked)) for _ in range(2))
    assert first == second and first.status == "ok" and first.price == 0
    assert isinstance(json.loads(first.text)["caption"], str)
    assert 0 < first.usage_out <= MAX_TOKENS["caption"] and first.usage_in > 4


def test_a_run_with_a_local_captioner(
    llava: Path,
    records: Callable[[int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    serve: Callable[..., object],
) -> None:
    server = serve()
    argv = ["--records", str(records(2)), "--ledger", str(tmp_path / "l.sqlite"), "--model", "m", "--free"]
    run.main([*argv, "--base-url", server.url, "--variants", "1", "--captioner", f"local:{llava}"])  # pyright: ignore
    with Ledger(tmp_path / "l.sqlite") as ledger:
        counts = {count.stage: count for count in ledger.answers.counts()}
        assert counts["caption"].model == "local:tiny" and counts["caption"].good
        assert ledger.settings()["captioner"] == "local:tiny" and ledger.pairs()


def test_a_missing_captioner_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        LocalCaptioner("nowhere/at/all", tmp_path)
