"""Tile sizes by architecture, kernel, dtype and largest D. Written by ``python -m ercn.kernels.tune``."""

TABLE = {
    "interpreter": {
        "programs": 6,
        "triangle_from": {"dim": 9, "pixels": 120},
        "forward": {
            "half": {
                64: (4, 1, 32, 64, 32, 1, True),
                0: (4, 1, 32, 32, 32, 1, False),
            },
            "float32": {
                64: (4, 1, 32, 32, 16, 1, True),
                0: (4, 1, 32, 32, 32, 1, False),
            },
        },
        "triangle": {
            "half": {
                64: (4, 1, 32, 32, 32, 1, True),
                0: (4, 1, 32, 32, 64, 1, False),
            },
            "float32": {
                64: (4, 1, 16, 32, 16, 2, True),
                0: (4, 1, 32, 32, 64, 1, False),
            },
        },
        "backward": {
            "half": {
                64: (4, 1, 32, 32, 32, 0),
                0: (4, 1, 32, 32, 64, 2),
            },
            "float32": {
                64: (4, 1, 32, 64, 16, 0),
                0: (4, 1, 32, 32, 64, 2),
            },
        },
        "pool": {
            "half": {0: (4, 1, 32, 32, 32)},
            "float32": {0: (4, 1, 32, 32, 16)},
        },
        "row_grad": {
            "half": {0: (4, 1, 32, 32, 32)},
            "float32": {0: (4, 1, 16, 32, 32)},
        },
        "weight_grad": {
            "half": {0: (4, 1, 32, 32, 32)},
            "float32": {0: (4, 1, 32, 32, 32)},
        },
    },
}
