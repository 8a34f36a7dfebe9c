"""What settings cost, measured on one device: in memory, in time, on more GPUs."""
