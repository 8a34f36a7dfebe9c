"""bigdet: a scale-out trainer for object detectors with large backbones."""
