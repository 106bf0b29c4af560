"""Depth Anything 3 geometry, computed once, cached in Zarr, and given to Pi0.5 as prefix tokens."""
