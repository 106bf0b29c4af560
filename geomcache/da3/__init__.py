"""Depth Anything 3: its published models, its weights, and the encoder that turns pictures into geometry."""

import os

os.environ.setdefault("DA3_LOG_LEVEL", "ERROR")  # read when upstream is imported: its logger prints to standard output
