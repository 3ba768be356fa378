"""Run programs, and functions in processes of their own: the only package that starts processes."""

from .programs import (
    PACKAGES,
    Companion,
    Conversation,
    Query,
    background,
    call_apart,
    call_watched,
    conversation,
    interact,
    read_until,
    reaping,
    require,
    run,
    search_path,
)

__all__ = [
    "PACKAGES",
    "Companion",
    "Conversation",
    "Query",
    "background",
    "call_apart",
    "call_watched",
    "conversation",
    "interact",
    "read_until",
    "reaping",
    "require",
    "run",
    "search_path",
]
