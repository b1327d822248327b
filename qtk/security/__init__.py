"""What an attacker gets: a copy of the model by asking it. Looked at float and quantized.

thief/     what is asked, a file each
clone      the network that learns from the answers
defence/   training that leaves a thief little: isolate (InI)
theft      the result; cloning, qtk.steal
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "steal":
        from qtk.security.cloning import steal

        return steal
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
