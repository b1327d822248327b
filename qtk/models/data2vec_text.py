"""data2vec for text: RoBERTa's block under another name."""

from functools import partial

from qtk.models import bert
from qtk.models._tiny import text

blocks = partial(bert.blocks, base="data2vec_text")
tiny = partial(text, "Data2VecTextModel", pad_token_id=1)
