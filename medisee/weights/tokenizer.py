"""Tokenizers: a small byte-level one trained on a run's own texts, and LLaVA's, built from its tokenizer.model.

LLaVA(-Med) was trained with transformers' slow Llama tokenizer, which splits a text at its added tokens and encodes
each piece by sentencepiece. In its `legacy` mode every piece gets a leading space, so that many added tokens are
followed by a token for a space; otherwise only the first piece does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from medisee.foundation.errors import InputError, library_errors
from medisee.foundation.json_files import read_json

SPECIAL = ("<unk>", "<s>", "</s>")
IMAGE_TOKEN = "<image>"
SPACE = "\u2581"

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_MOST_BYTES = 1 << 28  # of a file; the largest vocabularies of today need a tenth of it

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_BPE = 2


def read_tokenizer(folder: Path, load: Callable[[], PreTrainedTokenizerBase] | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a folder, by `load` or as transformers does; code that the folder holds is never run."""
    for path in (folder / name for name in _FILES if (folder / name).exists()):
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(f"{path}: too large for a tokenizer ({path.stat().st_size >> 20} MiB); copy it again.")
        read_json(path, "a tokenizer's file")
    lacks = "" if (folder / _FILES[0]).exists() else f"there is no {_FILES[0]}, and without it "
    with library_errors(folder, f"{lacks}its tokenizer cannot be used", "copy the tokenizer again"):
        try:
            tokenizer = load() if load else AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            tokenizer("A word.")
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            code = f"{folder / _FILES[1]}: auto_map names code of its own, which is never run"
            raise InputError(f"{code}; give a checkpoint with one of transformers' tokenizers.") from error
    return tokenizer


def token_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns how many rows an embedding needs for every token; some vocabularies leave out ids."""
    return 1 + max(tokenizer.get_vocab().values())


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Trains a tokenizer of at most `vocabulary` entries on texts in any order.

    Its first ids are Mistral's: 0 <unk>, which is also the padding, 1 <s>, 2 </s>.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def sentencepiece_tokenizer(path: Path, *, legacy: bool) -> PreTrainedTokenizerFast:
    """Builds LLaVA's tokenizer from tokenizer.model, with the ids of transformers' slow Llama tokenizer.

    If `legacy`, every piece between added tokens gets a leading space, else only the first.
    """
    proto = _sentencepiece_model(path)
    pieces, spec = proto.pieces, proto.trainer_spec
    vocabulary = {piece.piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(pieces),
            unk_token=pieces[spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    )
    if legacy:
        tokenizer.normalizer = _legacy_spaces()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    control = [AddedToken(piece.piece, normalized=False, special=True) for piece in pieces if piece.type == _CONTROL]
    tokenizer.add_special_tokens(control)
    unknown, begin, end = (pieces[number].piece for number in (spec.unk_id, spec.bos_id, spec.eos_id))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=begin, eos_token=end, pad_token=unknown
    )


def as_legacy(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns a tokenizer with the slow one's leading spaces, which transformers only approximates.

    Its own `legacy` Llama tokenizer leaves out the leading space of pieces that start with one, and loses its kind when
    it is saved. Every other tokenizer is returned unchanged.
    """
    rule = _backend(tokenizer).pre_tokenizer
    if not isinstance(rule, pre_tokenizers.Metaspace) or rule.prepend_scheme != "always" or rule.split:
        return tokenizer
    content = json.loads(_backend(tokenizer).to_str())
    backend = Tokenizer.from_str(json.dumps({**content, "pre_tokenizer": None}))
    backend.normalizer = _legacy_spaces()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.special_tokens_map)


def _legacy_spaces() -> normalizers.Normalizer:
    # Metaspace would not put its space before a piece that starts with one, such as " and " between two tokens.
    return normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])


def _sentencepiece_model(path: Path) -> Any:
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); copy the tokenizer again.") from error
    except DecodeError as error:
        raise InputError(f"{path}: not a sentencepiece model ({error}); copy the tokenizer again.") from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kinds = {piece.type for piece in proto.pieces}
    ids = (trainer.unk_id, trainer.bos_id, trainer.eos_id)
    if min(ids) < 0 or max(ids) >= len(proto.pieces):
        raise InputError(f"{path}: has no <unk>, <s> and </s>; expected Llama's kind of tokenizer, copy it again.")
    changed = normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or not normalizer.add_dummy_prefix
    if trainer.model_type != _BPE or changed or not kinds <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}:
        raise InputError(
            f"{path}: not Llama's kind of sentencepiece model (byte-pair encoding of unchanged text, leading space); "
            "give the checkpoint's own tokenizer.json."
        )
    return proto


def _merges(pieces: Sequence[Any]) -> list[tuple[str, str]]:
    # Sentencepiece joins the neighbours that make the piece with the best score, never control and byte pieces.
    scores = {piece.piece: piece.score for piece in pieces if piece.type == _NORMAL}
    found = [
        (-score, cut, whole)
        for whole, score in scores.items()
        for cut in range(1, len(whole))
        if whole[:cut] in scores and whole[cut:] in scores
    ]
    return [(whole[:cut], whole[cut:]) for _, cut, whole in sorted(found)]


def answer_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the text that ends an answer: ` </s>` as in LLaVA, without the space for byte-level tokenizers.

    Sentencepiece encodes that space as a separate token, which LLaVA's models have learnt to write.
    """
    spaces = _is_legacy(tokenizer) or isinstance(_backend(tokenizer).pre_tokenizer, pre_tokenizers.Metaspace)
    return f" {tokenizer.eos_token}" if spaces else str(tokenizer.eos_token)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Turns ids into text with its special tokens, without the leading spaces that encoding added to pieces."""
    if not _is_legacy(tokenizer):
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))
    added = set(tokenizer.added_tokens_decoder)  # type: ignore[attr-defined]
    pieces = [list(piece) for _, piece in groupby(ids, key=lambda token: token if token in added else -1)]
    return "".join(str(tokenizer.decode(piece, skip_special_tokens=False)) for piece in pieces)


def _is_legacy(tokenizer: PreTrainedTokenizerBase) -> bool:
    rule = _backend(tokenizer).normalizer
    return isinstance(rule, normalizers.Sequence) and isinstance(rule[0], normalizers.Prepend)


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    return tokenizer.backend_tokenizer  # type: ignore[attr-defined]


def add_candidate_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Adds the candidate tokens and then `<image>`, which get the ids 32000, 32001 and 32002 in Mistral's tokenizer.

    Tokens that the vocabulary already holds keep their ids: a transformers LLaVA-v1.5 has `<image>` at 32000 and a
    padding token at 32001, so the candidate tokens get 32002 and 32003.
    """
    vocabulary, added = tokenizer.get_vocab(), set(tokenizer.added_tokens_encoder)  # type: ignore[attr-defined]
    named = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, IMAGE_TOKEN]
    if taken := [token for token in tokens if token in named or (token in vocabulary and token not in added)]:
        raise InputError(
            f"model.candidate_tokens: {', '.join(taken)} already has a meaning in the tokenizer; choose another word."
        )
    missing = [token for token in (*tokens, IMAGE_TOKEN) if token not in vocabulary]
    tokenizer.add_tokens(missing, special_tokens=True)


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Returns the id of a token of the vocabulary."""
    found = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(found, int):
        raise ValueError(f"{token!r} is not a token of the vocabulary")
    return found
