"""The commands besides training and evaluation, their arguments, and how every command ends."""
