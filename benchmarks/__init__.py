"""Programs that measure qtk: accuracy, speed, and what the compiler makes of its kernels."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing is fetched
