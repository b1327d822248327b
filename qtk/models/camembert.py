"""CamemBERT: RoBERTa's block, for French."""

from functools import partial

from qtk.models import bert
from qtk.models._tiny import text

blocks = partial(bert.blocks, base="roberta")
tiny = partial(text, "CamembertModel", pad_token_id=1)
