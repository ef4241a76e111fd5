"""The journal of a run: what every step did to the weights, in a line of text, so that replaying it rebuilds them to the bit."""

from zo_opt.journal.format import Contents, read_journal
from zo_opt.journal.replaying import replay
from zo_opt.journal.writer import NAME, Journal

__all__ = ["NAME", "Contents", "Journal", "read_journal", "replay"]
