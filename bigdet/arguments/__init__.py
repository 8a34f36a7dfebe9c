"""Command lines, apart from what the commands import: --help answers without torch."""
