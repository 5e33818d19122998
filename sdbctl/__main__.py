"""``python -m sdbctl``."""

from sdbctl.cli import main

if __name__ == "__main__":
    main()
