"""LLaVA's tokenizer out of tokenizer.model: the ids of sentencepiece itself, piece by piece between added tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from medisee.config.model import Model
from medisee.foundation.errors import InputError
from medisee.models.processing import Example, MediSeeProcessor, Query
from medisee.models.seg_head import SegHeadSpec
from medisee.records.records import Turn
from medisee.weights.tokenizer import (
    add_candidate_tokens,
    answer_end,
    as_legacy,
    decode,
    sentencepiece_tokenizer,
    train_tokenizer,
)

CANDIDATES = ("[SEG]", "[BBOX]")
ADDED = {"</s>": 2, "[SEG]": 400, "[BBOX]": 401}
SPEC = SegHeadSpec(size=64, resize="longest", pixels="minmax", channels=32, grid=4)
QUESTION = "Where is the left lung in this scan?"


@pytest.fixture(scope="module")
def sentencepiece(sentencepiece_file: Path) -> Callable[[str], list[int]]:
    """Encodes as the slow tokenizer: cut at added tokens, each piece by sentencepiece with its leading space."""
    model = SentencePieceProcessor(model_file=str(sentencepiece_file))  # type: ignore[call-arg]

    def encode(text: str) -> list[int]:
        ids: list[int] = []
        for piece in re.split(r"(</s>|\[SEG\]|\[BBOX\])", text):
            ids += [ADDED[piece]] if piece in ADDED else model.encode(piece) if piece else []  # type: ignore[attr-defined]
        return ids

    return encode


@pytest.fixture(scope="module")
def tokenizer(sentencepiece_file: Path) -> PreTrainedTokenizerBase:
    tokenizer = sentencepiece_tokenizer(sentencepiece_file, legacy=True)
    add_candidate_tokens(tokenizer, CANDIDATES)
    return tokenizer


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


pieces = st.sampled_from(
    ["[SEG]", "[BBOX]", "</s>", " ", "  ", "\n", "the left", " lung", "é", "漢", "\u2581", ".", "x"]
)


@given(st.lists(pieces, max_size=12).map("".join))
def test_ids_are_sentencepiece_s(
    tokenizer: PreTrainedTokenizerBase, sentencepiece: Callable[[str], list[int]], text: str
) -> None:
    assert ids_of(tokenizer, text) == sentencepiece(text)


def test_spaces_around_added_tokens_are_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer.convert_ids_to_tokens(ids_of(tokenizer, "It is [SEG] and [BBOX]. </s>"))
    space = "\u2581"
    assert tokens == [
        *(f"{space}It", f"{space}is", space, "[SEG]", space, f"{space}and", space, "[BBOX]"),
        *(space, ".", space, "</s>"),
    ]


@pytest.mark.parametrize("text", ["It is [SEG] and [BBOX]. </s>", "[SEG]", " a  b\n[BBOX]\n", "é 漢 x"])
def test_decoding_returns_the_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert decode(tokenizer, ids_of(tokenizer, text)) == text


def test_it_stays_the_same_when_saved(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "It is [SEG] and [BBOX]. </s>"
    assert ids_of(again, text) == ids_of(tokenizer, text)
    assert (again.pad_token_id, answer_end(again)) == (0, " </s>")


def test_the_other_kind_has_one_leading_space(sentencepiece_file: Path) -> None:
    tokenizer = sentencepiece_tokenizer(sentencepiece_file, legacy=False)
    add_candidate_tokens(tokenizer, CANDIDATES)
    tokens = tokenizer.convert_ids_to_tokens(ids_of(tokenizer, "It is [SEG] and [BBOX]."))
    assert tokens[-4:] == ["\u2581and", "\u2581", "[BBOX]", "."]
    assert decode(tokenizer, ids_of(tokenizer, "It is [SEG] and [BBOX].")) == "It is [SEG] and [BBOX]."
    assert answer_end(tokenizer) == " </s>"


def test_transformers_own_legacy_kind_is_mended(
    sentencepiece_file: Path, sentencepiece: Callable[[str], list[int]]
) -> None:
    theirs = LlamaTokenizer.from_pretrained(sentencepiece_file.parent, legacy=True)
    add_candidate_tokens(theirs, CANDIDATES)
    text = "It is [SEG] and [BBOX]. </s>"
    assert ids_of(theirs, text) != sentencepiece(text)
    assert ids_of(as_legacy(theirs), text) == sentencepiece(text)


def test_other_tokenizers_stay_as_they_are(sentencepiece_file: Path) -> None:
    own = train_tokenizer([QUESTION], 300)
    assert as_legacy(own) is own
    assert answer_end(own) == "</s>"
    llama = sentencepiece_tokenizer(sentencepiece_file, legacy=False)
    assert as_legacy(llama) is llama


@pytest.fixture(scope="module")
def processor(tokenizer: PreTrainedTokenizerBase) -> MediSeeProcessor:
    return MediSeeProcessor(Model.model_validate({"mllm": {"vision_size": 28}}), tokenizer, SPEC)


@pytest.mark.parametrize(
    "answer", ["It is [SEG] and [BBOX].", "[SEG] and [BBOX].", "Sure,  [SEG] [BBOX]\nIt lies left."]
)
def test_a_prompt_has_the_ids_of_the_release(
    processor: MediSeeProcessor, sentencepiece: Callable[[str], list[int]], answer: str
) -> None:
    """The text is cut at <image>, each chunk encoded without its own <s>."""
    image = np.zeros((40, 30, 3), dtype=np.uint8)
    query = Query(record="r", target="t", question=QUESTION, answer=answer)
    batch = processor([Example(image, 40, 30, (query,))])
    text = f"[INST] <image>\n{QUESTION} [/INST] {answer} </s>"
    before, behind = text.split("<image>")
    expected = [1, *sentencepiece(before), *[402] * 4, *sentencepiece(behind)]
    assert batch.input_ids_SL[0].tolist() == expected
    prompt = sentencepiece(f"\n{QUESTION} [/INST]")
    assert batch.labels_N.tolist() == sentencepiece(behind)[len(prompt) :]
    assert processor.prompt_ids(QUESTION) == prompt


def test_a_conversation_has_the_ids_of_the_release(
    processor: MediSeeProcessor, sentencepiece: Callable[[str], list[int]]
) -> None:
    image = np.zeros((40, 30, 3), dtype=np.uint8)
    history = (Turn(question=QUESTION, answer="It is [SEG] and [BBOX]."),)
    query = Query(record="r", target="t", question="Why?", answer="[SEG] and [BBOX].", history=history)
    batch = processor([Example(image, 40, 30, (query,))])
    behind = f"\n{QUESTION} [/INST] It is [SEG] and [BBOX]. </s>[INST] Why? [/INST] [SEG] and [BBOX]. </s>"
    assert batch.input_ids_SL[0, -len(sentencepiece(behind)) :].tolist() == sentencepiece(behind)


def train(prefix: Path, **changes: object) -> Path:
    settings = {
        "vocab_size": 40,
        "hard_vocab_limit": False,
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "minloglevel": 2,
    }
    settings |= {"remove_extra_whitespaces": False, "unk_id": 0, "bos_id": 1, "eos_id": 2} | changes
    SentencePieceTrainer.train(sentence_iterator=iter([QUESTION] * 3), model_prefix=str(prefix), **settings)  # type: ignore[attr-defined]
    return prefix.with_suffix(".model")


@pytest.mark.parametrize(
    "change",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": ["lung"]},
        {"model_type": "unigram"},
        {"bos_id": -1},
    ],
)
def test_another_kind_of_sentencepiece_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"own\.model.*Llama's kind"):
        sentencepiece_tokenizer(train(tmp_path / "own", **change), legacy=True)


@pytest.mark.parametrize("content", [b"", b"<!doctype html>", b"\x0a\xff"])
def test_a_file_that_is_no_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.model"):
        sentencepiece_tokenizer(tmp_path / "tokenizer.model", legacy=True)
    with pytest.raises(InputError, match=r"none\.model: cannot be read"):
        sentencepiece_tokenizer(tmp_path / "none.model", legacy=True)
