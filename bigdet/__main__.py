"""``python -m bigdet`` is the ``bigdet`` command."""

from bigdet.cli.main import main

if __name__ == "__main__":
    main()
