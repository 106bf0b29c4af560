"""The cache on disk: its format, how it is written and read, and how it is checked."""
