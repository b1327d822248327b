"""ERNIE: BERT's block under another name."""

from functools import partial

from qtk.models import bert
from qtk.models._tiny import text

blocks = partial(bert.blocks, base="ernie")
tiny = partial(text, "ErnieModel")
