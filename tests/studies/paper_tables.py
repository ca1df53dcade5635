"""The figures of the paper's tables, written from the page: rows in its order, columns as the studies name them."""

A, R, C = "imagenet_a", "imagenet_r", "corruption_error"
SHIFTED = ("top1", A, R, C)
SIZES = ("parameters", "images_per_second", "top1")

COLUMNS = {
    "table1": SHIFTED,
    "table2": ("parameters", "top1"),
    "table3": SIZES,
    "table4": ("top1",),
    "table5": ("kl_conv", "kl_inv", "top1"),
    "table6": ("top1",),
    "table7": ("top1",),
    "table8": ("top1",),
    "table9": SHIFTED,
}
DATA = {f"table{n}": "ImageNet-100" if 4 <= n <= 7 else "ImageNet-1k" for n in range(1, 10)}

TABLES: dict[str, list[tuple[str, tuple[float, ...]]]] = {
    "table1": [
        ("ResNet-18", (68.74, 2.60, 31.90, 65.58)),
        ("ResNet-34", (72.62, 3.45, 35.17, 60.26)),
        ("ResNet-50", (75.57, 2.60, 35.61, 59.15)),
        ("ResNet-101", (77.00, 6.03, 38.77, 54.33)),
        ("ResNet-152", (77.96, 7.73, 40.72, 53.18)),
        ("RedNet-26", (75.19, 5.49, 33.33, 61.09)),
        ("RedNet-38", (76.88, 6.88, 34.80, 58.15)),
        ("RedNet-50", (77.72, 7.64, 35.72, 56.03)),
        ("RedNet-101", (78.35, 9.03, 36.30, 54.78)),
        ("RedNet-152", (78.54, 9.24, 36.84, 53.58)),
    ],
    "table2": [
        ("DeiT: RegNetY-16GF", (84, 82.9)),
        ("CiT-Ti: RegNetY-600M", (6, 74.0)),
        ("CiT-Ti: RedNet-26", (9, 76.0)),
        ("CiT-S: RegNetY-4GF", (21, 79.9)),
        ("CiT-S: RedNet-101", (26, 79.0)),
    ],
    "table3": [
        ("ResNet-50", (25.6, 1349.4, 76.2)),
        ("ResNet-101", (44.5, 799.4, 77.4)),
        ("RegNetY-600MF", (6.1, 1200.5, 75.5)),
        ("RegNetY-4.0GF", (20.6, 350.5, 79.4)),
        ("RegNetY-8.0GF", (39.2, 220.5, 79.9)),
        ("RedNet-26", (9.2, 1820.9, 73.6)),
        ("RedNet-50", (15.5, 1066.8, 78.4)),
        ("RedNet-101", (25.6, 657.4, 79.1)),
        ("RedNet-152", (34.0, 459.3, 79.3)),
        ("ViT-B/16", (86, 166.88, 77.9)),
        ("ViT-L/16", (307, 54.4, 76.5)),
        ("DeiT-Ti", (5.0, 3082.9, 72.2)),
        ("DeiT-S", (22, 1562.0, 79.8)),
        ("DeiT-Ti-KD", (6.0, 3060.8, 74.5)),
        ("DeiT-S-KD", (22, 1546.1, 81.2)),
        ("CiT-Ti", (6.0, 3053.0, 75.3)),
        ("CiT-S", (22, 1564.1, 82.0)),
        ("CiT-SAK", (26, 1414.1, 82.7)),
    ],
    "table4": [
        ("ResNet-10, no teacher", (81.5,)),
        ("ResNet-10, ResNet-18", (83.0,)),
        ("ResNet-10, RedNet-26", (82.6,)),
        ("ResNet-10, ResNet-18 + RedNet-26", (83.4,)),
        ("Mixer-Ti, no teacher", (80.5,)),
        ("Mixer-Ti, ResNet-18", (81.6,)),
        ("Mixer-Ti, RedNet-26", (80.9,)),
        ("Mixer-Ti, ResNet-18 + RedNet-26", (82.3,)),
        ("Transformer-Ti, no teacher", (81.8,)),
        ("Transformer-Ti, ResNet-18", (86.5,)),
        ("Transformer-Ti, RedNet-26", (85.0,)),
        ("Transformer-Ti, ResNet-18 + RedNet-26", (88.0,)),
    ],
    "table5": [
        ("ResNet-10", (0.261, 0.274, 83.4)),
        ("Mixer-Ti", (0.358, 0.313, 82.3)),
        ("CiT-Ti conv token", (0.255, 0.290, 87.1)),
        ("CiT-Ti inv token", (0.254, 0.154, 87.7)),
    ],
    "table6": [
        ("ResNet-18", (85.1,)),
        ("ResNet-50", (89.0,)),
        ("RedNet-26", (89.2,)),
        ("Transformer-Ti, no teacher", (81.8,)),
        ("Transformer-Ti, ResNet-18", (86.5,)),
        ("Transformer-Ti, ResNet-50", (86.6,)),
        ("Transformer-Ti, RedNet-26", (85.0,)),
        ("Transformer-Ti, two ResNet-18", (87.2,)),
        ("Transformer-Ti, ResNet-18 + ResNet-50", (87.0,)),
        ("Transformer-Ti, ResNet-18 + RedNet-26", (88.0,)),
    ],
    "table7": [
        ("1 token, no teacher", (81.8,)),
        ("1 token, ResNet-18", (81.9,)),
        ("1 token, RedNet-26", (80.7,)),
        ("1 token, ResNet-18 + RedNet-26", (83.5,)),
        ("3 tokens, ResNet-18 + RedNet-26", (88.0,)),
    ],
    "table8": [
        ("no stem", (79.8,)),
        ("convolution stem", (81.5,)),
        ("involution stem", (81.4,)),
        ("both stems", (81.8,)),
    ],
    "table9": [
        ("Random w/o KD, conv token", (79.80, 18.36, 42.35, 41.36)),
        ("Random w/o KD, inv token", (79.80, 18.35, 42.35, 41.35)),
        ("Random w/ KD, conv token", (81.43, 16.18, 45.08, 39.58)),
        ("Random w/ KD, inv token", (81.89, 18.80, 44.43, 40.95)),
        ("Align w/o KD, conv token", (81.72, 24.89, 41.88, 38.54)),
        ("Align w/o KD, inv token", (81.74, 24.88, 41.76, 38.56)),
        ("Align w/ KD, conv token", (82.11, 23.58, 47.41, 38.11)),
        ("Align w/ KD, inv token", (82.51, 25.15, 46.81, 38.04)),
    ],
}

# Claims of the text that the paper's own figures contradict, by study and the beginning of the claim.
CONTRADICTED = {
    ("table5", "the conv token is nearer to ResNet-18 than the inv token"),
    ("table5", "the conv token is nearer to RedNet-26 than ResNet-10"),
    ("table9", "advised, aligned: the conv token makes fewer errors under corruptions"),
}
