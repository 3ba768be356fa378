"""The configuration of apt, in the syntax of apt.conf(5): what it says of proxies is found and left out."""

import re
from dataclasses import dataclass

_COMMENT = r"/\*.*?(?:\*/|\Z)|(?<!:)//[^\n]*|#(?!clear\b|include\b)[^\n]*"
# A value without quotes may be a URI, so the slashes after a colon begin no comment here.
_TOKEN = re.compile(rf'(?P<skip>\s+|{_COMMENT})|(?P<end>[{{}};])|"[^"]*"?|(?:(?<=:)//|[^\s"{{}};])', re.DOTALL)
_PROXY = re.compile(r"acquire::(?:[^:]+::)?proxy(?:::.*)?", re.IGNORECASE | re.DOTALL)


@dataclass
class _Block:
    """An open block: its whole *name*, where it *start*s, and whether statements in it stay or go."""

    name: str
    start: int
    stays: bool = False
    goes: bool = False


def without_proxies(data: bytes) -> bytes:
    """Return *data*, the contents of a configuration file, without proxies; empty if nothing else is in it."""
    # Any byte is a character of this encoding.
    text = data.decode("latin-1")
    spans, anything_stays = _proxies(text)
    if not spans:
        return data
    if not anything_stays:
        return b""
    left, last = "", 0
    for start, end in spans:
        left += text[last:start]
        last = end
        # A line on which nothing else is goes as a whole.
        rest = re.compile(r"[ \t]*(?:\n|\Z)").match(text, end)
        if rest and not left.rpartition("\n")[2].strip():
            left = left[: left.rfind("\n") + 1]
            last = rest.end()
    return (left + text[last:]).encode("latin-1")


def _proxies(text: str) -> tuple[list[tuple[int, int]], bool]:
    """Return where in *text* the statements of proxies are, as start and end, and whether there are others."""
    spans: list[tuple[int, int]] = []
    blocks = [_Block("", 0)]
    name, start, in_name = "", -1, True

    def close(span: tuple[int, int], goes: bool) -> None:
        if goes:
            spans[:] = [*(other for other in spans if other[0] < span[0]), span]
            blocks[-1].goes = True
        else:
            blocks[-1].stays = True

    for token in _TOKEN.finditer(text):
        if token["skip"]:
            in_name = in_name and start < 0
        elif token["end"] is None:
            start = token.start() if start < 0 else start
            name += token[0].strip('"') if in_name else ""
        else:
            whole = f"{blocks[-1].name}::{name}".removeprefix("::")
            if token["end"] == "{":
                blocks.append(_Block(whole, start if start >= 0 else token.start()))
            elif start >= 0:
                close((start, token.end() - (token["end"] == "}")), bool(_PROXY.fullmatch(whole)))
            if token["end"] == "}" and len(blocks) > 1:
                block = blocks.pop()
                semicolon = re.compile(r"\s*;").match(text, token.end())
                end = semicolon.end() if semicolon else token.end()
                close((block.start, end), bool(_PROXY.fullmatch(block.name)) or (block.goes and not block.stays))
            name, start, in_name = "", -1, True
    if start >= 0:
        close((start, len(text)), bool(_PROXY.fullmatch(f"{blocks[-1].name}::{name}".removeprefix("::"))))
    return spans, any(block.stays for block in blocks)
