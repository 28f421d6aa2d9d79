"""Formats that hold many texts: R's lazy-load data, dictd, SWORD modules, control stanzas, WordNet."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

_STRING_VECTOR, _STRING = 16, 9
_MISSING_STRING = -1


def read_rdb(content: bytes) -> Iterator[list[str]]:
    """The character vectors of an R .rdb file, one list an object; other objects are passed over.

    An .rdb file is objects one behind another: 4 bytes of length, then zlib data, or `2` and bzip2, or `Z` and LZMA2.
    """
    at = 0
    while at < len(content):
        kind, start = content[at + 4 : at + 5], at + 4
        if kind == b"2":
            bz2_stream = bz2.BZ2Decompressor()
            raw, rest = bz2_stream.decompress(content[start + 1 :]), bz2_stream.unused_data
        elif kind == b"Z":
            filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
            lzma_stream = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=filters)
            raw, rest = lzma_stream.decompress(content[start + 1 :]), lzma_stream.unused_data
        else:
            zlib_stream = zlib.decompressobj()
            raw, rest = zlib_stream.decompress(content[start:]), zlib_stream.unused_data
        at = len(content) - len(rest)
        strings = _character_vector(raw)
        if strings is not None:
            yield strings


def _character_vector(raw: bytes) -> list[str] | None:
    """The strings of an object in R's XDR serialization, version 2 or 3; None where it is not a character vector."""
    if not raw.startswith(b"X\n"):
        raise ValueError("the .rdb file holds something else than R's XDR serialization")
    (version,) = struct.unpack_from(">i", raw, 2)
    at = 14
    if version >= 3:
        (length,) = struct.unpack_from(">i", raw, at)
        at += 4 + length
    flags, count = struct.unpack_from(">Ii", raw, at)
    if flags & 0xFF != _STRING_VECTOR:
        return None
    at += 8
    strings = []
    for _ in range(count):
        flags, length = struct.unpack_from(">Ii", raw, at)
        if flags & 0xFF != _STRING:
            raise ValueError("damaged character vector in the .rdb file")
        at += 8
        if length != _MISSING_STRING:
            strings.append(raw[at : at + length].decode("utf-8", "replace"))
            at += length
    return strings


_BASE64 = {
    digit: value for value, digit in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}


def read_dictd(index: bytes, dictionary: bytes) -> Iterator[str]:
    """The entries of a dictd dictionary in the order of the file, each once, without the dictionary's own information."""
    text = gzip.decompress(dictionary)
    own: set[tuple[int, int]] = set()
    places: set[tuple[int, int]] = set()
    for line in index.decode("utf-8", "replace").splitlines():
        word, offset, length = line.split("\t")[:3]
        place = (_base64_number(offset), _base64_number(length))
        (own if re.match("00-|00database", word) else places).add(place)
    for offset_bytes, length_bytes in sorted(places - own):
        yield text[offset_bytes : offset_bytes + length_bytes].decode("utf-8", "replace")


def _base64_number(digits: str) -> int:
    number = 0
    for digit in digits:
        number = number * 64 + _BASE64[digit]
    return number


class Verse(NamedTuple):
    """An entry of a SWORD module: its chapter as in `Matt.1`, its number in it (0: what precedes the first), markup."""

    chapter: str
    number: int
    markup: str


def read_sword(blocks: bytes, verses: bytes, texts: bytes) -> Iterator[Verse]:
    """The entries of one testament of a zText or zCom module (its .bzs, .bzv and .bzz files), empty ones left out.

    .bzv has 10 bytes for each verse of the versification: block, offset and length in the unpacked block;
    .bzs has 12 for each block: offset and length in .bzz, length unpacked. An entry that follows itself comes once.
    """
    chapter, number, held, unpacked, previous = "", 0, -1, b"", (-1, -1)
    for block, offset, length in struct.iter_unpack("<IIH", verses[: len(verses) // 10 * 10]):
        number += 1
        if not length or (block, offset) == previous:
            continue
        if block != held:
            start, size, _ = struct.unpack_from("<III", blocks, 12 * block)
            held, unpacked = block, zlib.decompress(texts[start : start + size])
        previous = (block, offset)
        markup = unpacked[offset : offset + length].decode("utf-8", "replace")
        begun = re.search(r'<chapter [^>]*\bsID="([^"]+)"', markup)
        if begun:
            chapter, number = begun.group(1), 0
        yield Verse(chapter, number, markup)


def read_stanzas(text: str) -> Iterator[dict[str, str]]:
    """Debian control stanzas; a field that goes on keeps its line breaks and their leading space."""
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line[:1] in (" ", "\t"):
                fields[name] = fields.get(name, "") + "\n" + line
            elif line:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        if fields:
            yield fields


class Description(NamedTuple):
    """A package's description: one line, and paragraphs."""

    synopsis: str
    paragraphs: list[str]


def parse_description(value: str) -> Description:
    """The Description field of a stanza; a line that begins with two spaces stands for itself."""
    synopsis, *lines = value.split("\n")
    paragraphs: list[str] = []
    is_open = False
    for line in lines:
        if line.strip() == "." or line.startswith("  "):
            is_open = False
            if line.strip() != ".":
                paragraphs.append(line.strip())
        elif is_open:
            paragraphs[-1] += " " + line.strip()
        else:
            paragraphs.append(line.strip())
            is_open = True
    return Description(synopsis.strip(), paragraphs)


class Synset(NamedTuple):
    """A WordNet synset: the number of its lexicographer file, its first lemma, its gloss without examples."""

    file_number: int
    lemma: str
    gloss: str


def read_wordnet(content: bytes) -> Iterator[Synset]:
    """The synsets of a WordNet data file."""
    for line in content.decode("latin-1").splitlines():
        if line.startswith("  "):
            continue
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        lemma = re.sub(r"\((?:a|p|ip)\)$", "", fields[4]).replace("_", " ")
        yield Synset(int(fields[1]), lemma, re.split(r';\s*"', gloss)[0].strip())
