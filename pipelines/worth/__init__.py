"""Does geometry help? An experiment with true geometry and cameras that move; docs/worth.md explains it."""
