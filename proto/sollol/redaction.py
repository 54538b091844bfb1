"""Keeps passwords out of logs and printed settings."""

import re

# Greedy to the last "@": masking too much of an odd address is better than showing half a password.
_USERINFO = re.compile(r"(://[^:/?#\s]*):[^\s\"']*@")
_ASSIGNED = re.compile(r"(?i)\b(password|passwd|secret|token|api[-_]?key)(=)[^&\s\"',]+")
_KEY = re.compile(r"\bsk-sollol-[\w-]+")
_BEARER = re.compile(r"(?i)\b(bearer\s+)[^\s\"',]+")


def redact(text: str) -> str:
    """Return `text` with passwords in addresses, `password=...` pairs, bearer tokens and our API keys masked."""
    if ":" not in text and "=" not in text and " " not in text and "sk-" not in text:
        return text
    text = _USERINFO.sub(r"\1:***@", text)
    text = _ASSIGNED.sub(r"\1\2***", text)
    text = _KEY.sub("sk-sollol-***", text)
    return _BEARER.sub(r"\1***", text)
