"""Refusals in words are told from texts that only sound like one."""

from __future__ import annotations

import pytest

from data_gen.rules.refusals import refuses

REFUSALS = """
I'm sorry, but I can't help with interpreting medical images.
I’m sorry, but I can’t assist with that request.
I am sorry, I cannot provide a medical diagnosis.
Sorry, I can't help with that.
As an AI language model, I cannot interpret medical images.
As an AI, I'm not able to view images.
I cannot provide medical advice.
I can't provide medical advice. Please consult a doctor.
I'm unable to analyze medical images.
I am not able to describe this image.
I won't be able to help with that.
Unfortunately, I cannot describe this image.
I apologize, but I cannot assist with this.
Ich kann leider keine medizinischen Bilder beurteilen.
Es tut mir leid, aber dabei kann ich nicht helfen.
抱歉，我无法协助处理医学图像。
很抱歉，我不能提供医疗建议。
对不起，我无法回答。
Lo siento, pero no puedo ayudar con eso.
Je suis désolé, je ne peux pas vous aider.
Désolé, mais je ne peux pas.
申し訳ありませんが、お手伝いできません。
죄송하지만 도와드릴 수 없습니다.
Mi dispiace, non posso aiutarti.
Desculpe, não posso ajudar com isso.
Извините, я не могу помочь.
**I'm sorry**, but I can't help with that.
> I'm sorry, but I cannot assist.
"I'm sorry, but I can't help with that."
{"error": "I'm sorry, but I can't help with interpreting medical images."}
{"caption": "I cannot see the image you uploaded."}
I can't see the image.
I cannot view images directly.
N/A
No caption available.
I don't feel comfortable providing a diagnosis.
I'm just an AI language model and can't do that.
We cannot assist with that request.
Unable to assist with that request.
I must decline to answer this.
It goes against my guidelines to describe it.
Sorry — that is not something I do.
"""
TEXTS = """
I cannot find the organ that makes bile; can you outline it?
I can't see it in this image: where is the organ that filters blood?
Which organ, when the patient cannot swallow, is to be examined?
the patient cannot live without this organ
It cannot be seen in this plane.
the organ that cannot regenerate after an injury of the spine
I am looking for the organ that stores bile; which is it?
Inferior vena cava carries blood to the heart.
Ischemia of which organ leads to jaundice?
I need the organ that makes insulin outlined, please.
I'm interested in the bright organ at the left; which is it?
In sorry shape after a crash is the organ that filters blood here
the small gland without which we cannot digest fat
We cannot live without this organ, which makes bile.
An axial CT slice of the upper belly. The liver is bright.
the organ that provides bile and cannot be replaced by dialysis
Nonenhanced CT of the abdomen.
None of the other organs stores bile as this one does.
Which organ can I not live without?
No contrast agent is visible in the vessels.
as an air-filled sac it holds gas near the middle
as an ai-guided biopsy target this lesion is bright
I am not sure which one it is: which organ makes bile?
Sorry to ask again: which organ makes bile?
the region that a surgeon could not help but see first
Comovirus
Entangled loops of the small bowel are visible.
Excuse me, which organ makes bile?
Sorry, which organ makes bile?
"""


@pytest.mark.parametrize("text", REFUSALS.strip().splitlines())
def test_a_refusal_is_found(text: str) -> None:
    assert refuses(text)
    assert refuses(f'{{"caption": "{text}"}}') or '"' in text, "whatever JSON it is wrapped in"


@pytest.mark.parametrize("text", TEXTS.strip().splitlines())
def test_a_genuine_text_stays(text: str) -> None:
    assert not refuses(text)
    assert not refuses(f'{{"caption": "{text}"}}')
