"""From annotated images to batches, and the way of one record through it all.

    making      sources/coco.py   reads its entry in the annotation file
                annotations.py    checks its objects; what is wrong is left out and counted
                shard_tar.py      writes KEY.jpg and KEY.json into a tar, 48 bytes into the index
                   |
    format      shard_set.py      the set: tars, index.npy, manifest.json, on disk or (remote.py,
                   |              cache.py) at an address; from here on the record is a row
                   |
    ordering    selection.py      is the row trained on?
                repeats.py        how often in a pass?
                groups.py         in which step, which lane, which slot?
                   |
                   |              streams/loader.py asks for the group of (step, lane)
                   v
    examples    train_groups.py   makes a group, from nothing but its step and lane:
                samples.py        the bytes and the record of each row, checked
                views.py          where the image is on the canvas, before a pixel is decoded
                decode.py         its pixels
                objects.py        its boxes, masks and keypoints, moved into the view
                transforms.py     mosaic, copy-paste, color: an Example
                collate.py        the Examples of a group, packed into four flat tensors
                   |
                   |              through memory that the processes share (streams/slots.py)
                   v
    streams     stream.py         unpacks them into a Batch

For example, image 42 is 640 wide and 480 high and has one object. It is row 7 of the index.
``groups.py`` puts row 7 into step 3, lane 1. ``views.py`` scales it to 1066 x 800, and its box of
x, y, width, height (64, 120, 320, 240) becomes x0, y0, x1, y1 (106.6, 200, 639.6, 600) on a canvas
of 1088 x 800.

``format`` knows files, ``ordering`` numbers only, ``examples`` one group, ``streams`` processes.
From the index on, everything is a function of (seed, phase, pass, step, lane, sample): any process
can make any group again. Evaluation takes the same way without an order: ``evaluation_groups`` of
``groups.py`` deals out every image once, and ``EvalStream`` of ``stream.py`` makes the groups.
"""
