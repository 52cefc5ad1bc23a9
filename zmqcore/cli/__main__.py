"""``python -m zmqcore.cli``: the same as the ``zmqcore`` script."""

from zmqcore.cli import main

if __name__ == "__main__":
    main()
