"""The batches of training and of evaluation, read ahead by loader processes or threads."""
