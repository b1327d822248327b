"""XLM-RoBERTa: RoBERTa's block, for a hundred languages; BGE-M3 and multilingual E5 are of it."""

from functools import partial

from qtk.models import bert
from qtk.models._tiny import text

blocks = partial(bert.blocks, base="roberta")
tiny = partial(text, "XLMRobertaModel", pad_token_id=1)
