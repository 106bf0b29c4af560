"""Closed-loop evaluation with geometry online; results and their comparison."""
