"""`python -m geomcache`, which `accelerate launch -m geomcache` runs."""

from geomcache.cli.main import main

if __name__ == "__main__":
    main()
