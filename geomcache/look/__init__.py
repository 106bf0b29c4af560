"""Looking into a cache: pictures, videos and rerun files of an episode, and a page about the whole."""
