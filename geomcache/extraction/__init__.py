"""Stage one as commands: DA3 over every frame of a dataset, into a cache that follows it."""
