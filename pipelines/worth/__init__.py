"""Does geometry help? An experiment with true geometry, cameras that move, pairs, seeds and intervals: docs/worth.md."""
