"""Weights that come from elsewhere: what a phase starts from, and detectors of other frameworks.

The way of weights into a run, in the order in which it is read:

1. ``start.py`` is the door: ``load_start(detector, ...)`` finds out what the phase starts from, has
   rank 0 read it, hands it to the other ranks and logs a table of what was loaded.
2. Two readers fill the detector. ``own_runs.py`` reads what bigdet wrote: a run, a checkpoint or a
   ``model.safetensors``; ``classes.py`` moves its rows to the run's classes.
   ``published_backbones.py`` reads a backbone that others trained: by timm's name, or from a file,
   which ``tensor_files.py`` opens without running anything in it (of a file with two sets of
   weights, ``moving_averages.py`` chooses one).
3. ``timm_layout.py`` converts the weights of a ``timm:NAME`` with timm's own functions. For other
   backbones ``backbone_names.py`` gives the tensors of others our names, with the rules of the
   framework that wrote them: ``torchvision_layout.py``, ``detectron_layout.py``,
   ``mmdetection_layout.py``. ``pixel_order.py`` makes up for images in another order.
4. ``models/weights.py`` copies tensors into the detector, part by part, if all of them fit.

``bigdet convert-weights`` uses the same layouts for whole detectors, by ``whole_detectors.py`` and
``torchvision_layout.py``.
"""
