"""The model that a training run starts with, and what its records contribute to it."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from medisee.config import Config
from medisee.models.medisee import MediSee
from medisee.models.mllm import load_tokenizer
from medisee.records.manifest import Manifest
from medisee.records.prompts import ANSWERS, CLASS_QUESTIONS, REQUESTS, candidate_text
from medisee.weights.checkpoints import check_same_model, load_checkpoint, local_checkpoint
from medisee.weights.tokenizer import add_candidate_tokens, train_tokenizer


def read_images_and_texts(
    config: Config, manifests: Sequence[Manifest], val: Manifest | None
) -> tuple[list[Path], set[str]]:
    """Reads all records once, and returns the images that the feature cache needs and the texts that a tokenizer needs.

    Either is empty where the run does not need it; where it needs neither, no record is read.
    """
    need_images = config.data.cache is not None
    need_texts = config.train.init is None and config.model.mllm.source is None
    images: list[Path] = []
    texts: set[str] = set()
    for manifest in (*manifests, *([val] if val and need_images else [])) if need_images or need_texts else ():
        for record in manifest:
            if need_images:
                images.append(manifest.image_path(record))
            if need_texts and manifest is not val:
                for target in record.targets:
                    texts |= {question.format(name=target.category) for question in CLASS_QUESTIONS}
                    texts |= {text for qa in target.qa for text in (qa.question, qa.answer)}
    return images, texts


def build_model(config: Config, texts: Set[str]) -> MediSee:
    """Builds the model, or loads the one that the run starts from.

    A tokenizer is trained on the records' texts if the run names neither a language model nor a checkpoint.
    """
    if config.train.init is not None:
        folder = local_checkpoint(config.train.init)
        check_same_model(folder, config.model)
        return load_checkpoint(folder, MediSee)
    if config.model.mllm.source is not None:
        tokenizer: PreTrainedTokenizerBase = load_tokenizer(config.model.mllm, config.model.candidate_tokens)
    else:
        candidates = candidate_text(config.model.candidate_tokens)
        always = {text.format(candidates=candidates) for text in ANSWERS} | {*REQUESTS, "[INST] ", " [/INST]"}
        tokenizer = train_tokenizer(texts | always, config.model.mllm.vocabulary)
        add_candidate_tokens(tokenizer, config.model.candidate_tokens)
    return MediSee(config.model, tokenizer)
