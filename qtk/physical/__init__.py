"""Attacks with things, float and quantized.

Small metal objects in X-ray images of luggage (X-Adv):

mesh       a ball of triangles, and whether a mesh is closed
thickness  how much of it a ray passes through, differentiable in the vertices
colour     what a scanner shows of a thickness: fitted curves, and Beer-Lambert
scene      bags that are drawn, with one prohibited item or none; classifier, which item it is
place      where objects lie around the item
exposure   the result; xray, qtk.xray

Patches that look natural (PAN, DPA):

ratings      images with patches, rated by a formula
naturalness  a network that rates; scores, what it says; assessment, what rounding does to it
front        the result; patches, qtk.naturalness

kept         what took long, in a folder
"""
