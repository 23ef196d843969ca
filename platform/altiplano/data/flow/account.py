"""Accounts of a prepared data set: what became of every document, by source and by language.

They add up: read = kept + held out + dropped, and the tokens of all copies are the tokens of the
store. Knows numbers only.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_SUMS = ("documents", "copies", "characters", "bytes", "tokens", "stored_tokens")


@dataclass
class Account:
    """What became of one source's documents."""

    language: str
    held_out: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """By reason."""
    notes: Counter[str] = field(default_factory=Counter)
    """Documents that were changed to be kept, and parts of them left out, by reason."""
    documents: int = 0
    """Kept ones, each counted once; so are `characters`, `bytes` and `tokens`."""
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    copies: int = 0
    """How often the kept documents stand in the store."""
    stored_tokens: int = 0
    """Tokens of all copies."""

    @property
    def read(self) -> int:
        """Documents read."""
        return self.documents + self.held_out + self.dropped.total()

    def metrics(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        return {
            "language": self.language,
            "documents_read": self.read,
            "documents_held_out": self.held_out,
            "documents_dropped": dict(sorted(self.dropped.items())),
            **{name: getattr(self, name) for name in _SUMS},
        }


def summary(accounts: dict[str, Account]) -> dict[str, Any]:
    """Accounts of all sources, by label, as JSON-able values; `languages` sums them up."""
    every = list(accounts.values())
    dropped = sum((account.dropped for account in every), Counter[str]())
    languages = {
        language: {
            name: sum(getattr(account, name) for account in every if account.language == language)
            for name in _SUMS
        }
        for language in sorted({account.language for account in every})
    }
    return {
        "documents_read": sum(account.read for account in every),
        "documents_kept": sum(account.documents for account in every),
        "documents_held_out": sum(account.held_out for account in every),
        "documents_dropped": dict(sorted(dropped.items())),
        "characters": sum(account.characters for account in every),
        "bytes": sum(account.bytes for account in every),
        "languages": languages,
        "sources": {label: account.metrics() for label, account in accounts.items()},
    }
