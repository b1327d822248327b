"""Images classified by a ViT in eight bits, and how often it says what the float model says.

python examples/vit_classify.py [folder or hub name of a ViT] [folder of images]
"""

import sys
from typing import Any

from transformers import AutoModelForImageClassification

import qtk
from qtk.fidelity import Fidelity
from qtk.models import vit


def main(path: str | None = None, images: str | None = None) -> Fidelity:
    """W8A8, calibrated on the images themselves."""
    if path is None or images is None:
        model, batch = vit.tiny()
        data: Any = [batch]
    else:
        model, data = AutoModelForImageClassification.from_pretrained(path), images
    qmodel = qtk.quantize(model, w=8, a=8, calib=data)
    print(qtk.summary(qmodel).table())
    result = qtk.evaluate(model, qmodel, data)
    print(result.table())
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
