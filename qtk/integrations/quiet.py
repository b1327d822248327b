"""Imports transformers' quantizers, ours excepted, without what they say about themselves.

They import torchao where it is installed, which warns of libraries that it cannot load and of names
that are old: nothing that concerns whoever imports qtk.
"""

import logging
import warnings

_before = logging.root.manager.disable
logging.disable(max(_before, logging.WARNING))
try:
    with warnings.catch_warnings(action="ignore"):
        import transformers.quantizers  # noqa: F401
finally:
    logging.disable(_before)
