"""What four-bit weights cost a language model, in perplexity.

python examples/opt_perplexity.py [folder or hub name of an OPT] [text file]
"""

import sys
from typing import Any

from transformers import AutoModelForCausalLM

import qtk
from qtk.fidelity import Fidelity
from qtk.models import opt


def main(path: str | None = None, text: str | None = None) -> Fidelity:
    """Float against W4A16, weights in groups of 32."""
    if path is None or text is None:
        model, batch = opt.tiny()
        data: Any = [batch]
    else:
        model, data = AutoModelForCausalLM.from_pretrained(path), text
    qmodel = qtk.quantize(model, w=4, a=16, group_size=32, calib=data)
    result = qtk.evaluate(model, qmodel, data)
    print(result.table())
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
