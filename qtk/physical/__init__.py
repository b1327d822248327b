"""Attacks with things: small metal objects in X-ray images of luggage (X-Adv), float and quantized.

mesh       a ball of triangles, and whether a mesh is closed
thickness  how much of it a ray passes through, differentiable in the vertices
colour     what a scanner shows of a thickness: fitted curves, and Beer-Lambert
scene      bags that are drawn, with one prohibited item or none
place      where objects lie around the item
xray       the attack and what it does to both models: `attack`
"""
