"""Learning after rounding, against the float model: a block at a time, or the whole model at once.

A rounder's codes are where it starts; what is learned is in trainable.py, what from in
objective.py, how in descent.py.
"""
