"""Pictures, videos and rerun files of an episode of a cache, and a page about a whole cache."""
