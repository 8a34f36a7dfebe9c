"""Write a detector as ONNX or as a program of torch.export, and check it on real images.

Its command line is in ``cli/arguments/export.py``.
"""

from __future__ import annotations

from bigdet.cli.arguments.export import parse_arguments
from bigdet.cli.running import answer_early

if __name__ == "__main__":
    answer_early(parse_arguments)

from collections.abc import Sequence

from bigdet.cli.inputs import list_inputs
from bigdet.cli.running import run_command
from bigdet.export.writing import (
    TOLERANCES,
    Differences,
    check_exportable,
    compare,
    load_exported,
    on_canvas,
    write_exported,
)
from bigdet.host.files import check_file
from bigdet.models.weights import load_detector
from bigdet.pictures.files import to_pixels


def main(argv: Sequence[str]) -> int:
    """Export one detector, check it, and return the exit code."""
    options = parse_arguments(argv)
    size = (options.size[0], options.size[1])
    detector = load_detector(options.model, keep_frozen=False)
    check_exportable(detector, options.out, size, options.batch)
    check_file(options.out, "out")
    inputs, num_bad = list_inputs(options.check) if options.check else ([], 0)
    if num_bad:
        raise ValueError(f"--check: {num_bad} of the images cannot be read (named above).")
    write_exported(detector, options.out, size, options.batch, options.candidates)
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.1f} MiB")
    if not inputs:
        print("not checked: --check IMAGES compares it with the detector")
        return 0
    exported = load_exported(options.out)
    all_images = Differences()
    for one in inputs:
        batch = on_canvas(detector, to_pixels(one.read()), size, options.batch)
        found = compare(detector, exported, batch)
        all_images = all_images.joined(found)
        print(f"{one.name}: {found}")
    print(f"{len(inputs)} images: {all_images}")
    if not all_images.is_within(TOLERANCES):
        raise ValueError(
            f"{options.out}: its detections differ from the detector's (accepted: at most "
            f"{TOLERANCES}). If detections are missing, raise --candidates."
        )
    return 0


if __name__ == "__main__":
    run_command(main)
