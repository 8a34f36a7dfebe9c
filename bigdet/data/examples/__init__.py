"""From the bytes of samples to the packed groups that a model is trained on."""
