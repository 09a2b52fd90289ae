"""Refusals in words: a model that will not answer often says so in the place of the answer, in any form and language."""

from __future__ import annotations

import re
import unicodedata

_NOT_ABLE = (
    r"(?:cannot|can ?not|can't|could not|couldn't|won't|will not|(?:am|are|'m|'re) (?:unable|not able|not allowed|not permitted)"
    r"(?: to)?|must decline|have to decline|(?:do not|don't) feel comfortable|lack the ability|"
    r"(?:do not|don't) have the (?:ability|expertise|training))"
)
# What a person who asks about an image does not say of himself, unlike "I cannot find the organ that makes bile".
_HELP = (
    "help|assist|provide|providing|offer|comply|interpret|analy[sz]e|analy[sz]ing|diagnose|diagnosing|describe|describing|"
    "comment|process|generate|generating|fulfill?|answer|respond|engage|continue|complete|"
    "give (?:a |any |you )?(?:medical|advice|diagnos)"
)
_SEE = (
    r"(?:see|view|access|open|read|display)(?: or \w+)? (?:any |the |this |that |an |your |attached |uploaded |medical )*"
    r"(?:image|picture|photo|scan|file|attachment)"
)
_MODEL = r"(?:an? )?(?:large |multimodal |text-based )?(?:ai (?:language )?(?:model|assistant|system|chatbot)|language model)"
_STARTS = re.compile(
    r"(?:i am|i'm|im|we are|we're) (?:so |very |really |truly )?(?:sorry|afraid)\b(?!.*\?$)"
    r"|(?:sorry|(?:my )?apologies)(?: ?[,.!:;—–-]| but\b| i\b| for\b| that\b)(?!.*\?$)|i (?:must )?apologi[sz]e\b"
    rf"|unfortunately,? (?:i|we) {_NOT_ABLE}"
    r"|(?:unable|not able|cannot|can't) (?:to )?(?:help|assist|comply|fulfill?|provide an?y? (?:medical|answer|description))\b"
    rf"|as (?:an ai(?:,| i\b)|{_MODEL})"
    # The same in other languages.
    r"|(?:es )?tut mir leid|leider kann ich|ich kann (?:leider|ihnen|dir|dabei|nicht|keine)|als (?:eine? )?ki\b"
    r"|(?:lo )?siento\b|lamento\b|no puedo\b|como (?:modelo de|una? ia\b|inteligencia)|me disculpo"
    r"|(?:je suis )?désolée?\b|(?:toutes )?mes excuses|je m'excuse|je ne (?:peux|suis) pas|en tant qu"
    r"|desculpe|sinto muito|não posso|mi dispiace|mi spiace|non posso|het spijt me|ik kan (?:helaas|u|je|geen)"
    r"|przepraszam|przykro mi|niestety|üzgünüm|maaf\b|tyvärr|beklager|desværre"
    r"|извините|к сожалению|простите|я не могу|вибачте|آسف|عذر|لا أستطيع|لا يمكنني|क्षमा|माफ़"
    r"|(?:很|非常)?(?:抱歉|遗憾|遺憾)|对不起|對不起|不好意思|我(?:无法|無法|不能)|作为(?:一[个個名])?(?:人工智能|ai|语言)|作為"
    r"|申し訳|すみません|ごめん|죄송|미안|ขออภัย|xin lỗi"
)
_HOLDS = re.compile(
    rf"\b(?:i|we) ?(?:\w+ly )?{_NOT_ABLE} (?:\w+ly )?(?:to |be able to )?(?:{_HELP})"
    rf"|\bi(?: am|'m) (?:just |only )?{_MODEL}|\bas (?:an ai|{_MODEL}),? i\b"
    r"|\b(?:against|violates?) (?:my|our|openai's|the) (?:\w+ )?(?:guidelines|policy|policies|programming)"
)
_HOLDS_UNLESS_ASKED = re.compile(rf"\b(?:i|we) ?{_NOT_ABLE} (?:to )?(?:\w+ly )?{_SEE}")
_NOTHING = re.compile(r"(?:n/a|not available|no (?:caption|description|answer)(?: available)?)\W*")


def refuses(text: str) -> bool:
    """Returns whether a text, or a text in its JSON, is a refusal or only says that there is none.

    Where somebody asks a question, "I cannot see it in this image" is not a refusal; "the patient cannot ..." never is.
    """
    plain = unicodedata.normalize("NFKC", text).replace("’", "'").lower()
    quoted = re.findall(r'"((?:[^"\\]|\\.)*)"', plain) if "{" in plain else []
    return any(map(_refuses, [plain, *quoted]))


def _refuses(text: str) -> bool:
    text = " ".join(re.sub(r"^[^\w]+", "", text).split())
    is_asked = text.endswith("?")
    found = _STARTS.match(text) or _HOLDS.search(text) or (not is_asked and _HOLDS_UNLESS_ASKED.search(text))
    return bool(found or _NOTHING.fullmatch(text))
