"""Changes of variable before quantization; one file a paper.

A transform is a function `find(site, scheme) -> Change`. It never touches the module that produces
x, so it needs to know nothing about the model: the quantizer of the site's input applies it.
"""
