"""Text without what opens doors: private keys and tokens, wherever they stand in it; pure."""

import re

_REMOVED = "[removed: {}]"
_PATTERNS = (
    # In JSON the line ends of a key are two characters; a block that was cut off goes to the end.
    (
        "private key",
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    ),
    # Header and claims of a JWT are JSON objects in base64; its signature may be missing.
    ("token", re.compile(r"\beyJ[\w-]+\.[\w-]+(?:\.[\w-]*)?")),
    ("token", re.compile(r"(?i)(?<=bearer )[\w~+/.=-]+")),
)


def without_secrets(text: str) -> str:
    """The text with each secret replaced by a word that says what was there."""
    for what, pattern in _PATTERNS:
        text = pattern.sub(_REMOVED.format(what), text)
    return text
