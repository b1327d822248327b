"""Changes of variable before quantization; one file a paper.

A transform is a function `find(site, scheme) -> (shift [K], channel_scale [K])`, both float32:

    x' = (x - shift) / channel_scale       applied by the quantizer of the site's input
    W' = W * channel_scale,   b' = b + W @ shift

so that x' W'^T + b' = x W^T + b. It never touches the module that produces x, so it needs to know
nothing about the model.
"""

from torch import Tensor

Transform = tuple[Tensor, Tensor]
