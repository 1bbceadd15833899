"""Hold a checkpoint against reference logits: ``megavlm convert verify`` by another name."""

import sys

# This folder has a module called inspect, as the standard library does: have the repository in its place.
sys.path[0] += "/../.."

from megavlm.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "verify"]
    sys.exit(main())
