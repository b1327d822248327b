"""Ahead-of-time packages of AOTInductor, and models that are served by them.

    a call's shape ── Route.choose ──> Package ──> outputs
                           └── none that fits, or eager is faster ──> the model's own forward

`package.py` is one file of native code for one size, or for any; `route.py` has those of one way to
call a model, with the times that decide between them; `bundle.py` keeps all of them beside a
checkpoint; `served.py` is the model. Nothing here compiles: `qtk/compiler` does.
"""
