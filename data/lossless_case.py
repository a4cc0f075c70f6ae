"""A bijection of Unicode text onto lower case and four operators, which SentencePiece sees instead.

"The NASA iPhone" becomes TITLE the, ALLCAPS nasa, i CAPNEXT phone, so that "The", "the" and "THE"
share pieces. The rules are in data/README.md; code points are those of the community's CaseOps.
"""

import re
import unicodedata

import numpy as np
from sentencepiece import SentencePieceProcessor

from train_gpt import require, token_bytes

TITLE = "\ue001"  # the first letter of a word is a capital
ALLCAPS = "\ue002"  # all letters of a word are, and it has two or more
CAPNEXT = "\ue003"  # the next letter is, within a word
ESC = "\ue004"  # the next character, an operator, stands for itself
OPERATORS = (TITLE, ALLCAPS, CAPNEXT, ESC)
NAME = "lossless_case_v1"  # in manifest.json

# This field at the end of a model takes its normalizer away: protobuf merges what is appended.
NO_NORMALIZER = b"\x1a\x02\x12\x00"  # normalizer_spec { precompiled_charsmap: "" }


def case_pairs() -> dict[str, str]:
    """Return the lower case of every capital that the transform knows.

    Only of pairs that Unicode 3.2 had: later versions, of other Pythons, cannot change those. All
    are in the first plane, and both letters of each have as many bytes in UTF-8.
    """
    known = unicodedata.ucd_3_2_0
    pairs = {}
    for capital in map(chr, range(1 << 16)):
        lower = capital.lower()
        is_pair = lower != capital and len(lower) == 1 and lower.upper() == capital
        if is_pair and "Cn" not in (known.category(capital), known.category(lower)):
            pairs[capital] = lower
    return pairs


LOWER = case_pairs()
LETTERS = frozenset([*LOWER, *LOWER.values()])
CAPITALS = re.compile(f"([{''.join(LOWER)}]+)")
LETTER = f"[{''.join(sorted(LETTERS))}]"
OPERATION = re.compile(f"{ESC}.|[{TITLE}{CAPNEXT}]{LETTER}|{ALLCAPS}{LETTER}+", re.DOTALL)


def encode(text: str) -> str:
    """Return `text` with capitals of pairs as operators and lower case, any of its own escaped."""
    # ESC is the first to be escaped: later it is there to escape others, too.
    for operator in reversed(OPERATORS):
        text = text.replace(operator, ESC + operator)

    # At odd places are the runs of capitals, at even ones what is between them.
    parts = CAPITALS.split(text)
    for i in range(1, len(parts), 2):
        lower = [LOWER[capital] for capital in parts[i]]
        begins = parts[i - 1][-1:] not in LETTERS
        ends = parts[i + 1][:1] not in LETTERS
        if begins and ends and len(lower) > 1:
            parts[i] = ALLCAPS + "".join(lower)
        else:
            parts[i] = (TITLE if begins else CAPNEXT) + CAPNEXT.join(lower)
    return "".join(parts)


def decode(text: str) -> str:
    """Undo `encode`; an operator with nothing to work on stays as it is."""
    return OPERATION.sub(lambda m: m[0][1:] if m[0][0] == ESC else m[0][1:].upper(), text)


class CaseTokenizer(SentencePieceProcessor):
    """Encodes as SentencePiece does, but what it has normalised passes `encode` before the pieces.

    In this order, because NFKC makes letters and joins them to marks: it would bring capitals
    back, and move the ends of words.
    """

    def __init__(self, model: bytes):
        super().__init__(model_proto=model + NO_NORMALIZER)
        self.normalizer = SentencePieceProcessor(model_proto=model)

    def encode(self, texts: list[str], **options) -> list[list[int]]:
        """Return the ids of every text; `options` are those of SentencePieceProcessor.encode."""
        texts = self.normalizer.normalize(texts)
        return super().encode([encode(text) for text in texts], **options)


def require_operators(tokenizer: SentencePieceProcessor, name: str) -> None:
    """Raise ConfigError unless the operators are pieces of their own and all text has pieces."""
    pieces = map(tokenizer.id_to_piece, range(tokenizer.vocab_size()))
    found = sorted(piece for piece in pieces if any(operator in piece for operator in OPERATORS))
    reserved = found == sorted(OPERATORS)
    require(reserved, f"{name}: U+E001 to U+E004 are not its symbols, as --lossless-case needs")
    has_bytes = tokenizer.is_byte(tokenizer.piece_to_id("<0x00>"))
    require(has_bytes, f"{name}: no pieces for bytes: --lossless-case would lose characters")


def original_bytes(tokenizer: SentencePieceProcessor, tokens: np.ndarray) -> np.ndarray:
    """Return the UTF-8 bytes of original text that each of (n,) tokens stands for, (n,) uint16.

    Operators have none, nor has BOS. Which letters they raise does not matter: both of a pair have
    as many.
    """
    as_lower = np.zeros(len(tokens), "<u2")
    as_lower[1:] = token_bytes(tokenizer, tokens)
    ids = [tokenizer.piece_to_id(operator) for operator in OPERATORS]
    sizes = np.where(np.isin(tokens, ids), 0, as_lower)

    # What follows an escape stands for itself, be it one more escape.
    literal = -1
    for place in np.flatnonzero(tokens[:-1] == ids[-1]):
        if place != literal:
            literal = place + 1
            sizes[literal] = as_lower[literal]
    return sizes
