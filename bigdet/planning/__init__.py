"""Memory and time of settings, also on more GPUs, predicted from measurements on one device."""
