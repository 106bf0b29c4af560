"""Stage one: DA3 over every frame of a dataset, into a cache."""
