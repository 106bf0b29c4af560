"""Closed-loop evaluation, DA3 online."""
