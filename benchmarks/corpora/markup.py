"""Markup to paragraphs: HTML, OSIS, man pages, pod, reStructuredText, and plain text with blank lines."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from typing import NamedTuple


def one_line(text: str) -> str:
    """White space, line breaks among it, as single spaces."""
    return " ".join(text.split())


def blocks(text: str) -> list[str]:
    """The paragraphs of plain text, which blank lines separate."""
    return [line for line in (one_line(block) for block in re.split(r"\n[ \t]*\r?\n", text)) if line]


_HTML_BREAKS = frozenset((
    "p", "li", "dd", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "td", "th", "div", "section", "blockquote",
    "tr", "table", "ul", "ol", "dl", "title", "figcaption", "hr",
))  # fmt: skip
_HTML_SKIPPED = frozenset((
    "script", "style", "pre", "nav", "head", "header", "footer", "form", "svg", "aside",
))  # fmt: skip
_HTML_SKIPPED_PARTS = frozenset(("navheader", "navfooter", "docnav", "headerlink", "toc", "related", "banner"))


class _HtmlText(HTMLParser):
    def __init__(self, inside: tuple[str, str] | None) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._inside = inside
        self._words: list[str] = []
        self._skipped, self._skip_depth = "", 0
        self._root, self._root_depth = "", 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in _HTML_BREAKS:
            self.end_paragraph()
        if tag == "br":
            self._words.append(" ")
        if self._skip_depth:
            self._skip_depth += tag == self._skipped
        elif tag in _HTML_SKIPPED or _HTML_SKIPPED_PARTS & {values.get("id"), *(values.get("class") or "").split()}:
            self._skipped, self._skip_depth = tag, 1
        if self._root_depth:
            self._root_depth += tag == self._root
        elif self._inside in attrs:
            self._root, self._root_depth = tag, 1

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._words.append(" ")
        if tag in _HTML_BREAKS:
            self.end_paragraph()

    def handle_endtag(self, tag: str) -> None:
        if tag in _HTML_BREAKS:
            self.end_paragraph()
        self._skip_depth -= bool(self._skip_depth and tag == self._skipped)
        self._root_depth -= bool(self._root_depth and tag == self._root)

    def handle_data(self, data: str) -> None:
        if not self._skip_depth and (self._root_depth or self._inside is None):
            self._words.append(data)

    def end_paragraph(self) -> None:
        line = one_line("".join(self._words))
        self._words.clear()
        if line:
            self.paragraphs.append(line)


def html_paragraphs(content: bytes, inside: tuple[str, str] | None = None) -> list[str]:
    """The paragraphs of an HTML page without code and navigation; `inside`: an attribute of the element that holds them."""
    charset = re.search(rb"""charset=["']?([\w-]+)""", content[:2000])
    try:
        text = content.decode(charset.group(1).decode() if charset else "utf-8")
    except (UnicodeDecodeError, LookupError):
        text = content.decode("latin-1")
    parser = _HtmlText(inside)
    parser.feed(text)
    parser.close()
    parser.end_paragraph()
    return parser.paragraphs


def osis_paragraphs(markup: str) -> list[str]:
    """The paragraphs of OSIS markup, as SWORD modules have it, without notes and titles."""
    markup = re.sub(r"<(note|title)\b[^>]*/>", " ", markup)
    markup = re.sub(r"<(note|title)\b.*?</\1>", " ", markup, flags=re.DOTALL)
    markup = re.sub(r"<(?:div|row|lg|lb|table)\b[^>]*>", "\n", markup)
    lines = (html.unescape(re.sub(r"<[^>]+>", " ", part)) for part in markup.split("\n"))
    lines = (re.sub(r"([“‘(\[]) ", r"\1", re.sub(r" ([,.;:!?’”)\]])", r"\1", one_line(line))) for line in lines)
    return [line for line in lines if line]


class ManPage(NamedTuple):
    """A manual page: the line of its NAME section, and the sections that follow with their paragraphs."""

    purpose: str
    sections: list[tuple[str, list[str]]]


_MAN_CODE = {"nf": "fi", "EX": "EE", "TS": "TE", "Bd": "Ed", "ig": ".", "de": "."}
_MAN_PARAGRAPHS = frozenset((
    "P", "PP", "LP", "Pp", "TP", "TQ", "IP", "HP", "sp", "RS", "RE", "It", "Bl", "El", "SS", "Ss", "in",
    "br", "Bd", "Ed",
))  # fmt: skip
_MAN_FONTS = frozenset(("B", "I", "SM", "SB"))
_MAN_ALTERNATING = frozenset(("BR", "RB", "BI", "IB", "IR", "RI"))
_MDOC_SILENT = frozenset((
    "Dd", "Dt", "Os", "Sm", "Bk", "Ek", "Rs", "Re", "Pf", "Xo", "Xc", "Fo", "Fc", "In", "Cd", "Lb", "Ft",
    "Vt", "Fd", "Ns", "No", "Bx", "Tg", "An", "Nd", "Ap",
))  # fmt: skip
_MDOC = frozenset((
    "Ad", "Ar", "Cm", "Dv", "Em", "Er", "Ev", "Fa", "Fl", "Fn", "Ic", "Li", "Nm", "Pa", "Sy", "Tn", "Va",
    "Xr", "Op", "Oo", "Oc", "Po", "Pc", "Pq", "Dq", "Sq", "Ql", "Qq", "Aq", "Bq", "Brq", "Do", "Dc", "So",
    "Sc", "Ux", "At", "Fx", "Nx", "Ox", "Mt", "Lk",
))  # fmt: skip
_MAN_CHARACTERS = {
    "aq": "'", "dq": '"', "em": "—", "en": "–", "hy": "-", "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "bu": "•",
    "co": "©", "mu": "×", "rs": "\\", "ti": "~", "ha": "^", "ga": "`", "->": "→", "<=": "≤", ">=": "≥", "bv": "|",
}  # fmt: skip


def man_page(content: bytes) -> ManPage | None:
    """A man or mdoc page as text, code left out; None where it has no NAME line or only includes another page."""
    try:
        source = content.decode("utf-8")
    except UnicodeDecodeError:
        source = content.decode("latin-1")
    sections: list[tuple[str, list[list[str]]]] = []
    page_name, purpose, code_end = "", "", ""
    for line in source.splitlines():
        request = re.match(r"[.'][ \t]*(\S*)[ \t]*(.*)$", line)
        name, rest = request.groups() if request else ("", line)
        if request and name in ("SH", "Sh"):
            code_end = ""
            sections.append((one_line(man_text(rest.strip('" '))).upper(), [[]]))
        elif code_end:
            code_end = "" if request and name == code_end else code_end
        elif not sections:
            continue
        elif name in _MAN_CODE:
            code_end = _MAN_CODE[name]
            sections[-1][1].append([])
        elif request:
            if name in _MAN_PARAGRAPHS:
                sections[-1][1].append([])
            if name == "Nm" and not page_name:
                page_name = man_text(rest.split()[0]) if rest else ""
            if name == "Nd":
                purpose = one_line(man_text(rest))
            if name in ("SS", "Ss"):
                sections[-1][1][-1:] = [[man_text(rest.strip('" '))], []]
            sections[-1][1][-1].append(_man_request(name, rest, page_name))
        elif rest.strip():
            sections[-1][1][-1].append(man_text(rest))
        else:
            sections[-1][1].append([])
    texts = [(title, [line for line in map(_joined, paragraphs) if line]) for title, paragraphs in sections]
    if not texts or texts[0][0] != "NAME":
        return None
    if not purpose:
        named = re.search(r"\s(?:-+|–|—)\s+(.+)", " ".join(texts[0][1]))
        purpose = named.group(1) if named else ""
    return ManPage(purpose, texts[1:]) if purpose else None


def _joined(words: list[str]) -> str:
    return one_line(
        re.sub(r" +(?=[,.;:!?)\]](?:\s|$))", "", re.sub(r"([(\[]) +", r"\1", " ".join(filter(None, words))))
    )


def _man_request(name: str, rest: str, page_name: str) -> str:
    arguments = [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"?|(\S+)', rest)]
    if name in _MAN_FONTS:
        return man_text(" ".join(arguments))
    if name in _MAN_ALTERNATING:
        return man_text("".join(arguments))
    if name in _MDOC or name == "It":
        return man_text(_mdoc_line([name, *arguments], page_name))
    return ""


def _mdoc_line(words: list[str], page_name: str) -> str:
    out: list[str] = []
    at = 0
    while at < len(words):
        word, following = words[at], words[at + 1 : at + 3]
        at += 1
        if word == "Xr" and len(following) == 2:
            out.append(f"{following[0]}({following[1]})")
            at += 2
        elif word == "Nm":
            out.append("" if following and following[0] not in ",.;:)" else page_name)
        elif word == "Fl":
            out.append("-" + (following[0] if following else ""))
            at += 1
        elif word == "Fn" and following:
            out.append(f"{following[0]}()")
            return " ".join([*out, *(w for w in words[at + 1 :] if w in (",", ".", ";", ")"))])
        elif word not in _MDOC and word not in _MDOC_SILENT and word != "It":
            out.append(word)
    return " ".join(out)


def man_text(text: str) -> str:
    """Roff escapes as the characters they stand for; fonts and sizes are dropped."""
    text = re.sub(r"\\[\"#].*", "", text)
    text = re.sub(r"\\f(?:\[[^\]]*\]|\(..|.)|\\s[+-]?\d+|\\[|^&%/,:)c]|\\[hvw]'[^']*'|\\m\[[^\]]*\]", "", text)
    text = re.sub(
        r"\\(?:\((..)|\[([^\]]*)\])", lambda m: _MAN_CHARACTERS.get(m.group(1) or m.group(2), ""), text
    )  # fmt: skip
    text = re.sub(r"\\\*(?:\(..|\[[^\]]*\]|.)", "", text)
    return text.replace("\\-", "-").replace("\\ ", " ").replace("\\~", " ").replace("\\e", "\\").replace("\\'", "'")


def pod_paragraphs(text: str) -> list[str]:
    """The paragraphs of Perl's pod: headings, items and prose; verbatim blocks are left out."""
    paragraphs = []
    is_pod, skipped = False, False
    for block in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n").strip("\n")):
        command = re.match(r"=(\w+)\s*(.*)", block, re.DOTALL)
        if command:
            name, rest = command.groups()
            is_pod = name != "cut"
            skipped = name == "begin" or (skipped and name != "end")
            if not skipped and (name.startswith("head") or name == "item"):
                paragraphs.append(pod_text(re.sub(r"^(?:\*|\d+\.?)\s*", "", rest) if name == "item" else rest))
        elif is_pod and not skipped and block[:1] not in (" ", "\t", ""):
            paragraphs.append(pod_text(block))
    return [line for line in map(one_line, paragraphs) if line]


_POD_ESCAPES = {"lt": "<", "gt": ">", "sol": "/", "verbar": "|"}


def pod_text(text: str) -> str:
    """Pod's formatting codes as plain text, from the innermost outwards."""
    pattern = re.compile(r"([A-Z])(?:<<+ ((?:(?![A-Z]<).)*?) >>+|<((?:(?![A-Z]<)[^<>])*)>)", re.DOTALL)
    while True:
        replaced = pattern.sub(lambda m: _pod_code(m.group(1), m.group(2) or m.group(3) or ""), text)
        if replaced == text:
            return text.replace("\0", "<").replace("\1", ">")
        text = replaced


def _pod_code(code: str, inner: str) -> str:
    inner = inner.replace("<", "\0").replace(">", "\1")
    if code in "XZ":
        return ""
    if code == "E":
        entity = _POD_ESCAPES.get(inner) or html.unescape(f"&#{inner};" if inner.isdigit() else f"&{inner};")
        return entity.replace("<", "\0").replace(">", "\1")
    if code == "L":
        label, bar, _ = inner.partition("|")
        page, slash, section = inner.partition("/")
        if bar or not slash or "://" in inner:
            return label
        section = section.strip('"')
        return f"{section} in {page}" if page else section
    return inner


def rst_paragraphs(text: str) -> list[str]:
    """The headings and prose of reStructuredText; what is indented (code, directives' bodies), tables and fields are not."""
    paragraphs = []
    for block in re.split(r"\n[ \t]*\n", text):
        lines = block.strip("\n").splitlines()
        lines = [line for line in lines if not re.fullmatch(r"([=\-~^\"'`#*+.:_])\1{2,}\s*", line)]
        if not lines or re.match(r"\s|\.\.(?:\s|$)|:[\w -]+:(?!`)|[+|]|=+ +=", lines[0]):
            continue
        paragraphs.extend(_rst_items(lines))
    return [line for line in (one_line(_rst_text(paragraph)) for paragraph in paragraphs) if line]


def _rst_items(lines: list[str]) -> list[str]:
    """A paragraph, or the items of a list, each with the lines that go on with it."""
    items: list[str] = []
    for line in lines:
        bullet = re.match(r"(?:[-*+•]|\(?\w{1,2}[.)])\s+", line)
        if bullet or not items:
            items.append(line[bullet.end() :] if bullet else line)
        else:
            items[-1] += " " + line.strip()
    return items


def _rst_text(text: str) -> str:
    text = re.sub(r":[\w:+-]+:`(?:([^`<]+?)\s*<[^`>]*>|([^`]*))`", lambda m: m.group(1) or m.group(2), text)
    text = re.sub(r"``(.+?)``", r"\1", text)
    text = re.sub(r"`([^`<]+?)(?:\s*<[^`>]*>)?`_{0,2}", r"\1", text)
    text = re.sub(r"(?<![\w*])\*{1,2}(\S(?:[^*]*\S)?)\*{1,2}(?![\w*])", r"\1", text)
    return re.sub(r"::$", ":", text.rstrip())
