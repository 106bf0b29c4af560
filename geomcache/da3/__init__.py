"""Depth Anything 3: its published models, its weights, and the encoder that turns pictures into geometry."""
