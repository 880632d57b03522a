"""``python -m muvit``: the command ``muvit``."""

from muvit.cli import entrypoint

if __name__ == "__main__":
    entrypoint()
