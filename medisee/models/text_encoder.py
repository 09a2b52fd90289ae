"""Text as token ids: only our templates bring special tokens, whatever a user's text holds."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from medisee.weights.tokenizer import token_id

_PLACE = "\U0010ffff"  # a noncharacter, which Unicode keeps for use inside programs


class TextEncoder:
    """Encodes texts in which special tokens are words like any others, between tokens that are given by their ids.

    A tokenizer finds special tokens in any text, so that a question with "</s>" or "[SEG]" would end or mark something.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
        """`tokens` count as special even where the tokenizer has them as common ones."""
        added = tokenizer.added_tokens_decoder.items()  # type: ignore[attr-defined]
        self._special: dict[str, int] = {token.content: number for number, token in added if token.special}
        self._special |= {token: token_id(tokenizer, token) for token in tokens}
        self._never = {number for token, number in self._special.items() if token != tokenizer.unk_token}
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
        # It takes the place of each given token, since a token between two texts decides how their spaces are encoded.
        self._backend.add_tokens([AddedToken(_PLACE, normalized=False)])

    def parse(self, text: str, tokens: Sequence[str] | None = None) -> list[str | int]:
        """Splits a text at its special tokens, or only at those that are named, into texts and ids."""
        wanted = sorted(self._special if tokens is None else tokens, key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, wanted))})", text)
        return [self._special[piece] if index % 2 else piece for index, piece in enumerate(pieces)]

    def __call__(self, *pieces: str | int) -> list[int]:
        """Returns the ids of texts and given ids; ValueError for text that is not Unicode or can only be a token."""
        text = "".join(_PLACE if isinstance(piece, int) else piece.replace(_PLACE, "\ufffd") for piece in pieces)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("the text is not valid Unicode; write it in UTF-8.") from error
        self._backend.encode_special_tokens = True  # here, since a copy in another process forgets it
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if found := self._never.intersection(ids):
            token = next(name for name, number in self._special.items() if number in found)
            raise ValueError(f"the text holds {token!r}, which this tokenizer reads as a token only; remove it.")
        given, place = (piece for piece in pieces if isinstance(piece, int)), self._backend.token_to_id(_PLACE)
        return [next(given) if number == place else number for number in ids]
