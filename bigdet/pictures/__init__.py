"""Pictures: files to pixels, and boxes, masks and keypoints drawn on them."""
