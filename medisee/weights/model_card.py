"""The README.md beside a checkpoint on the Hugging Face hub: what it is, how to load it, what it is not for."""

from __future__ import annotations

from huggingface_hub import ModelCardData

from medisee.config.model import Model

CARD = "README.md"

_TEXT = """---
{data}
---

# {name}

A medisee model: it answers a question about a medical image with an explanation, a mask and a box. Weights and code are
for research; **this is not a medical device**.

```python
from medisee import MediSee, ask

model = MediSee.from_pretrained("{hub_id}")
answer = ask(model, "slice.png", "Which organ makes bile?")
print(answer.text, answer.box)
```

| part | |
|---|---|
| language model | {language_model} |
| learnt of it | {learnt} |
| image tokens | {image_tokens} |
| seg head | {seg_head}, {size} px |
| candidate tokens | {tokens} |
| prompts of the mask decoder | {prompts} |

`config.json` holds every setting and the step it was saved at. The terms of the base weights and of the training data
apply to these weights too. Not stated here: what data it was trained and measured on; add it, with the licences, before
others use it.
"""


def model_card(config: Model, hub_id: str) -> str:
    """Returns the card's Markdown; nothing of this machine, such as a path, is in it."""
    source = config.mllm.source
    base = source if source is not None and source.count("/") == 1 and not source.startswith((".", "/")) else None
    data = ModelCardData(
        library_name="medisee",
        pipeline_tag="image-segmentation",
        tags=["medical", "reasoning-segmentation", "detection"],
        base_model=base,
    )
    return _TEXT.format(
        data=data.to_yaml(),
        name=hub_id.rpartition("/")[2],
        hub_id=hub_id,
        language_model=base or ("published weights" if source else f"random weights, {config.mllm.size.hidden} wide"),
        learnt=config.mllm.train,
        image_tokens=config.mllm.image_tokens,
        seg_head=config.seg_head.kind,
        size=config.seg_head.size,
        tokens=", ".join(f"`{token}`" for token in config.candidate_tokens),
        prompts=", ".join(config.prompts),
    )
