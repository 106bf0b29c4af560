"""The pipeline of stage one: decode or carry over, encode, write."""
