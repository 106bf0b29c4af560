"""Caches on the Hub and in object stores."""
