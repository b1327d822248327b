"""What sits in a quantized model. The only folder that calls qtk_kernels."""
