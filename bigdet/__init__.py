"""bigdet: a scale-out trainer for object detectors with large backbones."""

__version__ = "0.1.0"
