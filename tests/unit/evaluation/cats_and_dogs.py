"""Two classes, two places, and annotations and results of them."""

from bigdet.data.format.shard_set import Category

CATEGORIES = [Category(1, "cat"), Category(2, "dog")]
CAT, DOG = [0, 0, 20, 20], [50, 50, 20, 20]


def truth(box, label=0, iscrowd=0):
    return {"id": 1, "label": label, "bbox": box, "area": box[2] * box[3], "iscrowd": iscrowd}


def found(category_id, box, score, image_id=7):
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
