"""Backdoors in quantized models: planted to test with, looked for, and rounded away."""
