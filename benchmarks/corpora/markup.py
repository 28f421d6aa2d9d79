"""Markup to paragraphs: OSIS, and plain text with blank lines."""

from __future__ import annotations

import html
import re


def one_line(text: str) -> str:
    """White space, line breaks among it, as single spaces."""
    return " ".join(text.split())


def blocks(text: str) -> list[str]:
    """The paragraphs of plain text, which blank lines separate."""
    return [line for line in (one_line(block) for block in re.split(r"\n[ \t]*\r?\n", text)) if line]


def osis_paragraphs(markup: str) -> list[str]:
    """The paragraphs of OSIS markup, as SWORD modules have it, without notes and titles."""
    markup = re.sub(r"<(note|title)\b[^>]*/>", " ", markup)
    markup = re.sub(r"<(note|title)\b.*?</\1>", " ", markup, flags=re.DOTALL)
    markup = re.sub(r"<(?:div|row|lg|lb|table)\b[^>]*>", "\n", markup)
    lines = (html.unescape(re.sub(r"<[^>]+>", " ", part)) for part in markup.split("\n"))
    lines = (re.sub(r"([“‘(\[]) ", r"\1", re.sub(r" ([,.;:!?’”)\]])", r"\1", one_line(line))) for line in lines)
    return [line for line in lines if line]
