"""Run programs, and functions in processes of their own: the only package that starts processes."""

from .apart import Companion, call_apart, call_watched
from .children import reaping
from .conversations import Conversation, conversation
from .installed import PACKAGES, require, search_path
from .pipelines import flow, stream, together
from .programs import Query, background, interact, read_until, run

__all__ = [
    "PACKAGES",
    "Companion",
    "Conversation",
    "Query",
    "background",
    "call_apart",
    "call_watched",
    "conversation",
    "flow",
    "interact",
    "read_until",
    "reaping",
    "require",
    "run",
    "search_path",
    "stream",
    "together",
]
