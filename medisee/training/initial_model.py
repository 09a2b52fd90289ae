"""The model that a training run begins with."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from medisee.config import Config
from medisee.models.medisee import MediSee
from medisee.models.mllm import load_tokenizer
from medisee.records.manifest import Manifest
from medisee.records.prompts import ANSWERS, CLASS_QUESTIONS, REQUESTS, candidate_text
from medisee.weights.checkpoints import check_same_model, load_checkpoint, local_checkpoint
from medisee.weights.tokenizer import add_candidate_tokens, train_tokenizer


def build_model(config: Config, manifests: Sequence[Manifest]) -> MediSee:
    """Builds the model, or loads the one that the run starts from.

    Where no language model is named and there is nothing to start from, its tokenizer is trained on the manifests' texts.

    Raises:
        InputError: `train.init` is no checkpoint, or that of another model.
    """
    if config.train.init is not None:
        folder = local_checkpoint(config.train.init)
        check_same_model(folder, config.model)
        return load_checkpoint(folder, MediSee)
    if config.model.mllm.source is not None:
        tokenizer: PreTrainedTokenizerBase = load_tokenizer(config.model.mllm, config.model.candidate_tokens)
    else:
        tokenizer = train_tokenizer(_texts(config, manifests), config.model.mllm.vocabulary)
        add_candidate_tokens(tokenizer, config.model.candidate_tokens)
    return MediSee(config.model, tokenizer)


def _texts(config: Config, manifests: Sequence[Manifest]) -> set[str]:
    candidates = candidate_text(config.model.candidate_tokens)
    texts = {text.format(candidates=candidates) for text in ANSWERS} | set(REQUESTS) | {"[INST] ", " [/INST]"}
    for manifest in manifests:
        for record in manifest:
            for target in record.targets:
                texts |= {question.format(name=target.category) for question in CLASS_QUESTIONS}
                texts |= {text for qa in target.qa for text in (qa.question, qa.answer)}
    return texts
