"""A small byte-level BPE tokenizer, trained on a run's own texts when there is no pretrained language model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>")
IMAGE_TOKEN = "<image>"


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Trains a tokenizer whose first ids are Mistral's: 0 <unk>, which is also the padding, 1 <s>, 2 </s>.

    Args:
        texts: what it is trained on; the order does not matter.
        vocabulary: the most entries it may have.
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


def add_candidate_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Adds the candidate tokens and then `<image>`, so that Mistral's get 32000, 32001 and 32002."""
    missing = [token for token in (*tokens, IMAGE_TOKEN) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Returns the id of one token that the vocabulary holds."""
    found = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(found, int):
        raise ValueError(f"{token!r} is no single token of the vocabulary")
    return found
