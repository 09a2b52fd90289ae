"""LLaVA-Med, or another Llava, on this machine: it writes captions for a model that sees no image."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import torch

from data_gen.core.calls import IMAGE_PREFIX, Reply, Request, canonical
from data_gen.core.prompts import MAX_TOKENS
from medisee.config.model import Mllm, Model, SegHeadConfig
from medisee.models.mllm import load_mllm, load_tokenizer
from medisee.models.processing import MediSeeProcessor
from medisee.models.seg_head import SegHeadSpec
from medisee.records.images import read_image
from medisee.records.prompts import CANDIDATE_TOKENS
from medisee.weights.llava import load_pretrained


class LocalCaptioner:
    """Captions images one at a time, on a GPU when there is one."""

    def __init__(self, source: str, root: Path) -> None:
        """Loads the model `source`, the folder or hub id of a Llava; `root` is the folder of the images."""
        self._root = root
        vision: Any = load_pretrained(Mllm(source=source)).llava.config.vision_config
        mllm = Mllm(source=source, train="frozen", vision_size=vision.image_size, vision_patch=vision.patch_size)
        tokenizer = load_tokenizer(mllm, CANDIDATE_TOKENS)
        # No seg head takes part; the processor needs its frame all the same.
        spec = SegHeadSpec(size=64, resize="longest", pixels="minmax", channels=8, grid=4)
        self._processor = MediSeeProcessor(Model(mllm=mllm, seg_head=SegHeadConfig()), tokenizer, spec)
        llava: Any = load_mllm(mllm, tokenizer, spec)
        self._llava = llava.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self._turn = asyncio.Lock()

    async def send(self, request: Request) -> Reply:
        """Captions the image of a request, free of charge."""
        async with self._turn:
            return await asyncio.to_thread(self._caption, request)

    @torch.no_grad()
    def _caption(self, request: Request) -> Reply:
        system, user = request.body["messages"][:2]
        text, image = user["content"]
        name = image["image_url"]["url"].removeprefix(IMAGE_PREFIX).partition(":")[2]
        device = self._llava.device
        pixels_3VV = self._processor.vision_pixels(read_image(self._root / name))
        ids = self._processor.prefix + self._processor.prompt_ids(f"{system['content']}\n{text['text']}")
        input_ids_1L = torch.tensor([ids], device=device)
        made_1L: Any = self._llava.generate(
            input_ids=input_ids_1L,
            attention_mask=torch.ones_like(input_ids_1L),
            pixel_values=pixels_3VV[None].to(device, self._llava.dtype),
            max_new_tokens=MAX_TOKENS["caption"],
            do_sample=False,
            pad_token_id=self._processor.pad_id,
        )
        new = made_1L[0, len(ids) :].tolist()
        caption = str(self._processor.tokenizer.decode(new, skip_special_tokens=True)).strip()
        if self._processor.end_id not in new and "." in caption:
            caption = caption[: caption.rindex(".") + 1]  # cut off at the limit: drop the incomplete sentence
        return Reply(status="ok", text=canonical({"caption": caption}), usage_in=len(ids), usage_out=len(new))
