"""Token ids as readable text that is safe to print on a page or a terminal."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from minimind_v.core.data.prompt import Tokens
from minimind_v.core.data.tokenizer import Tokenizer

INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode categories of control characters and the like
LONGEST = 4  # bytes of a character in UTF-8


@dataclass(frozen=True)
class Piece:
    """One token; several tokens that form characters only together; or all patches of one image."""

    text: str
    ids: tuple[int, ...]
    token_bytes: tuple[str, ...] = ()  # in hex, per token: for several tokens, or bytes that are no text
    special: bool = False
    supervised: bool = False
    removed: bool = False  # by truncation
    picture: int | None = None  # number of the image from 0, for patches


class TokenReader:
    """Decodes ids token by token; byte-level vocabularies, as MiniMind's, by their bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        self._specials = {
            number for number, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special
        }

    def pieces(self, tokens: Tokens, kept: int, tokens_per_image: int, limit: int) -> list[Piece]:
        """The first pieces, at most `limit`; truncation removed the tokens from `kept` on."""
        pieces: list[Piece] = []
        at = pictures = 0
        while at < len(tokens) and len(pieces) < limit:
            if tokens.image_mask[at]:
                ids = tuple(tokens.input_ids[at : at + tokens_per_image])
                pieces.append(Piece("", ids, removed=at >= kept, picture=pictures))
                pictures += 1
            else:
                pieces.append(self._piece(tokens, at, kept))
            at += len(pieces[-1].ids)
        return pieces

    def _piece(self, tokens: Tokens, at: int, kept: int) -> Piece:
        """The token at a position and, if it ends within a character, those that complete it."""
        supervised, removed = tokens.loss_mask[at], at >= kept
        first = tokens.input_ids[at]
        if first in self._specials:
            return Piece(self._name(first), (first,), (), True, supervised, removed)
        data, token_bytes, end = b"", [], at
        while end < len(tokens) and (end < kept or removed) and end - at < LONGEST:
            if tokens.input_ids[end] in self._specials or tokens.image_mask[end]:
                break
            token_bytes.append(self.bytes_of(tokens.input_ids[end]))
            data += token_bytes[-1]
            end += 1
            if (text := _whole(data)) is not None:
                shown = tuple(chunk.hex(" ").upper() for chunk in token_bytes) if len(token_bytes) > 1 else ()
                return Piece(text, tuple(tokens.input_ids[at:end]), shown, False, supervised, removed)
        # No text, or the cut went through a character.
        return Piece("", (first,), (token_bytes[0].hex(" ").upper(),), False, supervised, removed)

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token."""
        name = self._name(token)
        if all(character in BYTES for character in name):
            return bytes(BYTES[character] for character in name)
        return name.encode("utf-8", "surrogatepass")

    def text(self, token: int) -> str | None:
        """The text of a token; None for a special token, and for bytes that are no whole characters."""
        return None if token in self._specials else _whole(self.bytes_of(token))

    def name(self, token: int) -> str:
        """A token as text that is never empty: a special one by its name, incomplete characters in hex."""
        if token in self._specials:
            return self._name(token)
        return self.text(token) or self.bytes_of(token).hex(" ").upper()

    def _name(self, token: int) -> str:
        return self._backend.id_to_token(token) or f"#{token}"


def _byte_characters() -> dict[str, int]:
    """The alphabet of byte-level vocabularies (GPT-2's): printable bytes stand for themselves, others from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_characters()


def _whole(data: bytes) -> str | None:
    """The text of bytes; None if they end within a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def visible(text: str) -> str:
    """The text with control, direction and surrogate characters escaped; newlines as ↵, tabs as ⇥."""
    if text.isascii() and text.isprintable():
        return text
    shown = []
    for character in text:
        if character == "\n":
            shown.append("↵")
        elif character == "\t":
            shown.append("⇥")
        elif unicodedata.category(character) in INVISIBLE:
            shown.append(f"\\u{ord(character):04x}")
        else:
            shown.append(character)
    return "".join(shown)
