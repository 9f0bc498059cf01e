"""Odd texts for tokenizers: scripts, emoji, control characters, runs of spaces, numbers, code, tokens' names.

Drawn from a seed by `random` alone, so that they are the same wherever they are made: what they are encoded
to is stored, the texts are not.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

SCRIPTS = (
    (0x41, 0x5A),  # Latin
    (0x61, 0x7A),
    (0xC0, 0xFF),
    (0x100, 0x17F),
    (0x391, 0x3A1),  # Greek
    (0x3B1, 0x3C9),
    (0x410, 0x44F),  # Cyrillic
    (0x531, 0x556),  # Armenian
    (0x5D0, 0x5EA),  # Hebrew
    (0x627, 0x63A),  # Arabic
    (0x660, 0x669),  # its digits
    (0x905, 0x939),  # Devanagari
    (0x93E, 0x94C),  # its vowel signs
    (0xB85, 0xB8A),  # Tamil
    (0xE01, 0xE30),  # Thai
    (0x10D0, 0x10F0),  # Georgian
    (0x1E00, 0x1EFF),  # Latin again, with accents
    (0x3041, 0x3096),  # Hiragana
    (0x30A1, 0x30FA),  # Katakana
    (0x4E00, 0x9FA5),  # Han
    (0xAC00, 0xD7A3),  # Hangul
    (0x20000, 0x2A6D6),  # Han beyond the first plane
    (0x1D400, 0x1D454),  # mathematical letters
)
MARKS = (
    "\u0301\u0308\u0323\u200d\ufe0f\u00a0\u2003\u3000\u2028\u200b\ufeff\ufffd\u2581\u0120\u00ad\u0130\u0149\ufb01"
    "\uff21\uff11\u00bd\u2167\u01c5\u1e9b\u212b\u2126\u00df\u0345"
)
"""Accents, joiners, spaces, tokenizers' own letters, ligatures, and what normalisation changes."""
EMOJI = ("😀", "👍🏽", "👩‍👩‍👧‍👦", "🇫🇷", "🏴‍☠️", "❤️", "☃", "🧑🏿‍🚀", "1️⃣", "🫠")
CODE = (
    "def f(x):\n    return x**2  # ok\n",
    'for (int i=0;i<10;++i){\n\tprintf("%d\\n",i);\n}\r\n',
    '{"a": [1, 2.5e-3, null], "b": {}}',
    "SELECT * FROM t WHERE x >= '2024-01-01';",
    "https://example.org/a?b=c&d=%20#e",
    '<div class="x">it\'s</div>',
    "a+=b;c||d&&!e",
)
PROSE = (
    "Call me Ishmael. Some years ago - never mind how long precisely - having little or no money in my "
    "purse, and nothing particular to interest me on shore, I thought I'd sail about a little and see the "
    "watery part of the world. It's a way I have; they'll say he's WE'RE I'VE isn't."
)
ENGLISH = PROSE.split()


def _word(rng: random.Random) -> str:
    first, last = rng.choice(SCRIPTS)
    return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6)))


def _piece(rng: random.Random, names: Sequence[str]) -> str:
    kind = rng.randrange(13)
    if kind == 0:
        return _word(rng)
    if kind == 1:
        return _word(rng) + rng.choice(MARKS) + _word(rng)[:2]
    if kind == 2:
        return rng.choice(EMOJI)
    if kind == 3:
        return chr(rng.choice([*range(32), 127, 0x85, 0x9F]))
    if kind == 4:
        return rng.choice(" \t\n\r\u3000") * rng.choice((1, 2, 3, 4, 8, 17, 40))
    if kind == 5:
        return str(rng.randrange(10 ** rng.randint(1, 12))) + rng.choice(("", ".5", ",000", "%", "e-7"))
    if kind == 6:
        start = rng.randrange(6)
        return rng.choice(CODE)[start : start + rng.randint(3, 30)]
    if kind == 7 and names:
        name = rng.choice(names)
        return rng.choice((name, name, name[:-1], name + " ", " " + name, name.upper()))
    if kind == 8:
        return rng.choice(
            ("!?", "...", "--", "''", '"', "(", "]", "@#$", "_", "\\", "«", "。", "، ", "'S", "'ll")
        )
    return " ".join(rng.choice(ENGLISH) for _ in range(rng.randint(1, 4)))


def odd_texts(count: int, seed: int, names: Sequence[str] = ()) -> list[str]:
    """Returns odd texts; the first is empty, the next ones are single marks.

    Args:
        count: how many.
        seed: of what is drawn.
        names: tokens whose names appear in the texts, whole and cut.
    """
    rng = random.Random(seed)
    texts = ["", " ", "  ", "\n", *MARKS, *EMOJI]
    while len(texts) < count:
        pieces = [_piece(rng, names) for _ in range(rng.choice((1, 2, 3, 5, 8)))]
        texts.append(rng.choice(("", " ")).join(pieces))
    return texts[:count]
