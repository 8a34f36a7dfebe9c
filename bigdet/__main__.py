"""``python -m bigdet`` is the ``bigdet`` command."""

from bigdet.cli import main

if __name__ == "__main__":
    main()
