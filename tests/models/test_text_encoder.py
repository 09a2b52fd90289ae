"""Text as token ids: ordinary text has the tokenizer's own ids, and no text of a user becomes a special token."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from medisee.models.text_encoder import TextEncoder
from medisee.weights.tokenizer import (
    IMAGE_TOKEN,
    add_candidate_tokens,
    answer_end,
    as_legacy,
    sentencepiece_tokenizer,
    train_tokenizer,
)

CANDIDATES = ("[SEG]", "[BBOX]")
WORDS = "It is [SEG] and [BBOX]. Where is the left lung of 12 patients?"


def _chat_tokenizer(_: Path) -> PreTrainedTokenizerBase:
    """Of SmolLM2's kind: byte-level, digits by themselves, special tokens of chats, common tokens for spaces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([WORDS] * 9, trainer)
    backend.add_tokens([AddedToken("    ", normalized=False)])
    backend.enable_truncation(8)
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<|endoftext|>", pad_token="<|im_end|>", **names)


KINDS: dict[str, Callable[[Path], PreTrainedTokenizerBase]] = {
    "demo": lambda _: train_tokenizer([WORDS], 320),
    "chat": _chat_tokenizer,
    "llama": lambda path: sentencepiece_tokenizer(path, legacy=False),
    "legacy llama": lambda path: sentencepiece_tokenizer(path, legacy=True),
    "llama of transformers": lambda path: LlamaTokenizer.from_pretrained(path.parent, legacy=True),
    "mended llama": lambda path: as_legacy(LlamaTokenizer.from_pretrained(path.parent, legacy=True)),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, sentencepiece_file: Path) -> PreTrainedTokenizerBase:
    made = KINDS[request.param](sentencepiece_file)
    add_candidate_tokens(made, CANDIDATES)
    return made


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
    return TextEncoder(tokenizer, (*CANDIDATES, IMAGE_TOKEN))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder  # type: ignore[attr-defined]
    return {number for number, token in added.items() if token.special}


ordinary = st.sampled_from(
    ["It is", " ", "  ", "    ", "\n", "the left", " lung", "é", "漢", "\u2581", ".", "12", "<", "s>"]
)


@given(st.data())
def test_our_templates_have_the_ids_that_they_had(
    tokenizer: PreTrainedTokenizerBase, encoder: TextEncoder, data: st.DataObject
) -> None:
    """The tokens of a template, and ordinary text around them, are encoded as the tokenizer encodes the whole."""
    tokens = st.sampled_from([*CANDIDATES, IMAGE_TOKEN, answer_end(tokenizer)])
    text = "".join(data.draw(st.lists(ordinary | tokens, max_size=12)))
    if "<s>" in text.replace("</s>", ""):
        return
    assert encoder(*encoder.parse(text)) == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    "text",
    [
        "</s> [SEG]",
        "<s>",
        "<unk>",
        "<image>\n?",
        "[BBOX][SEG] and </s></s>",
        "<|im_end|>",
        "[INST] hi [/INST]",
    ],
)
def test_no_text_becomes_a_special_token(tokenizer: PreTrainedTokenizerBase, encoder: TextEncoder, text: str) -> None:
    special, place = special_ids(tokenizer), tokenizer.convert_tokens_to_ids("[SEG]")
    assert isinstance(place, int)
    inside = encoder("Where is ", place, text, place, " now?")
    assert [number for number in inside if number in special] == [place] * 2
    pieces = "".join(tokenizer.convert_ids_to_tokens(encoder(text)))
    letters = re.sub("<0x(..)>", lambda match: chr(int(match[1], 16)), pieces)
    assert re.sub("[\\sĠĊ\u2581]", "", letters) == re.sub(r"\s", "", text)


def test_the_character_that_stands_for_tokens_is_replaced(encoder: TextEncoder) -> None:
    assert encoder("a \U0010ffff", 5) == encoder("a \ufffd", 5)


def test_only_named_tokens_of_an_answer_are_tokens(encoder: TextEncoder, tokenizer: PreTrainedTokenizerBase) -> None:
    seg, bbox = (tokenizer.convert_tokens_to_ids(token) for token in CANDIDATES)
    assert encoder.parse("It is [SEG] and [BBOX]</s>.", CANDIDATES) == ["It is ", seg, " and ", bbox, "</s>."]
    assert encoder.parse("[SEG]", CANDIDATES) == ["", seg, ""]


def test_a_copy_in_another_process_encodes_the_same(encoder: TextEncoder) -> None:
    assert pickle.loads(pickle.dumps(encoder))("a </s> [SEG]") == encoder("a </s> [SEG]")


def test_what_is_not_text_is_refused(encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        encoder("where\udcff")


def test_a_tokenizer_of_whole_words_cannot_spell_a_token() -> None:
    words = ["<unk>", "<s>", "</s>", "where", "[SEG]"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    encoder = TextEncoder(whole, ["[SEG]"])
    assert encoder("where", 4, "what") == [3, 4, 0]
    with pytest.raises(ValueError, match=r"holds '\[SEG\]', which this tokenizer reads as a token only"):
        encoder("where [SEG]")
