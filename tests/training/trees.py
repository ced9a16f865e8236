"""Tiny data sets in the exact layouts of the official ones, with three classes of four images."""

from pathlib import Path

import numpy as np
from PIL import Image

from .conftest import write_image

CLASSES = ("Albatross", "Bunting", "Catbird")


def cub(root: Path) -> Path:
    """`CUB_200_2011`. Odd images train, ids begin at 1, boxes are x y width height."""
    base = root / "CUB_200_2011"
    lines: dict[str, list[str]] = {}

    def add(name: str, *values: object) -> None:
        lines.setdefault(name, []).append(" ".join(map(str, values)))

    for number, name in enumerate(CLASSES, 1):
        add("classes.txt", number, f"{number:03d}.{name}")
    for part, name in enumerate(("beak", "left eye"), 1):
        add("parts/parts.txt", part, name)
    image = 0
    for number, name in enumerate(CLASSES, 1):
        for index in range(4):
            image += 1
            path = f"{number:03d}.{name}/{name}_{index:04d}_{image}.jpg"
            write_image(base / "images" / path, number - 1, image)
            add("images.txt", image, path)
            add("image_class_labels.txt", image, number)
            add("train_test_split.txt", image, image % 2)
            add("bounding_boxes.txt", image, "1.0", "2.0", f"{10 + index}.0", "8.0")
            add("parts/part_locs.txt", image, 1, "5.0", "6.5", 1)
            add("parts/part_locs.txt", image, 2, "0.0", "0.0", 0)
    for name, text in lines.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("\n".join(text) + "\n")
    return root


def cars(root: Path) -> Path:
    """`stanford_cars` as torchvision expects it. Boxes count from 1."""
    from scipy.io import savemat

    base = root / "stanford_cars"
    kinds = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    for split, annotations in (
        ("train", base / "devkit" / "cars_train_annos.mat"),
        ("test", base / "cars_test_annos_withlabels.mat"),
    ):
        rows = []
        for index in range(6):
            name = f"{index + 1:05d}.jpg"
            write_image(base / f"cars_{split}" / name, index % 3, index)
            rows.append((3, 4, 20 + index, 15, index % 3 + 1, name))
        annotations.parent.mkdir(parents=True, exist_ok=True)
        table = np.array(rows, dtype=[(kind, "O") for kind in kinds])
        savemat(annotations, {"annotations": table.reshape(1, -1)})
    names = np.array(CLASSES, dtype=object).reshape(1, -1)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})
    return root


def aircraft(root: Path) -> Path:
    """`fgvc-aircraft-2013b`. The images are 40 x 30, and their lowest 20 rows are white."""
    data = root / "fgvc-aircraft-2013b" / "data"
    (data / "images").mkdir(parents=True)
    (data / "variants.txt").write_text("\n".join(f"{name}/9" for name in CLASSES) + "\n")
    boxes, number = [], 1000000
    for split in ("train", "val", "test"):
        rows = []
        for index in range(6):
            number += 1
            pixels = np.full((30, 40, 3), 40 + index, dtype="uint8")
            pixels[10:] = 255
            Image.fromarray(pixels).save(data / "images" / f"{number}.jpg", quality=95)
            rows.append(f"{number} {CLASSES[index % 3]}/9")
            boxes.append(f"{number} 2 3 30 9")
        (data / f"images_variant_{split}.txt").write_text("\n".join(rows) + "\n")
    (data / "images_box.txt").write_text("\n".join(boxes) + "\n")
    return root


def pets(root: Path) -> Path:
    """`oxford-iiit-pet`. In the trimaps 1 is the animal, 2 the background and 3 the border."""
    base = root / "oxford-iiit-pet"
    (base / "annotations" / "trimaps").mkdir(parents=True)
    trimap = np.full((20, 28), 2, dtype="uint8")
    trimap[5:10, 6:12] = 3
    trimap[6:9, 7:11] = 1
    for split in ("trainval", "test"):
        rows = []
        for label, name in enumerate(CLASSES, 1):
            for index in range(2):
                image = f"{name}_{index + (split == 'test') * 10}"
                write_image(base / "images" / f"{image}.jpg", label - 1, index)
                Image.fromarray(trimap).save(base / "annotations" / "trimaps" / f"{image}.png")
                rows.append(f"{image} {label} 1 1")
        (base / "annotations" / f"{split}.txt").write_text("\n".join(rows) + "\n")
    return root


def flowers(root: Path) -> Path:
    """`flowers-102`. torchvision checks the checksums of the two real .mat files, so tests turn that off."""
    from scipy.io import savemat

    base = root / "flowers-102"
    for index in range(1, 10):
        write_image(base / "jpg" / f"image_{index:05d}.jpg", index % 3, index)
    savemat(base / "imagelabels.mat", {"labels": np.array([[1 + i % 3 for i in range(9)]])})
    savemat(base / "setid.mat", {"trnid": [[1, 2, 3]], "valid": [[4, 5, 6]], "tstid": [[7, 8, 9]]})
    return root


def birds(root: Path) -> Path:
    """The two unpacked Debian packages. They hold three birds, one a cartoon, and every background."""
    from ggam_fast.training.data.readers.birds import BACKGROUNDS, SPLIT_OF_BACKGROUND, STAMPS

    (root / STAMPS / "cartoon").mkdir(parents=True)
    for index, name in enumerate(("crow", "duck", "cartoon/tux")):
        pixels = np.zeros((40, 60, 4), dtype="uint8")
        pixels[10:30, 5:50] = (250, 10 * index, 0, 255)
        Image.fromarray(pixels).save(root / STAMPS / f"{name}.png")
    (root / BACKGROUNDS).mkdir(parents=True)
    for number, name in enumerate(sum(SPLIT_OF_BACKGROUND.values(), ())):
        Image.new("RGB", (400, 300), (0, 20 * number, 200)).save(root / BACKGROUNDS / f"{name}.jpg")
    return root
