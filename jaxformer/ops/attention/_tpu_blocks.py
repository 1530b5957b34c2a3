"""Block sizes of the TPU kernels of attention: the best compiled, by static schedule.

Made by scripts/make_tpu_blocks.py with libtpu 0.0.42.1; no chip has run them. Head sizes that are
missing take the nearest entry. Blocks of float32 are small, so that they compile in seconds.
"""

# chip: {(pass, head size, bytes of a number): (query, key, rows, columns, ahead)}
TABLE = {
    "TPU v5 lite": {
        ("forward", 64, 2): (1024, 1024, 128, 512, 1),
        ("backward", 64, 2): (1024, 1024, 256, 256, 1),
        ("forward", 128, 2): (1024, 1024, 128, 512, 1),
        ("backward", 128, 2): (1024, 1024, 256, 256, 1),
        ("forward", 192, 2): (1024, 1024, 256, 256, 1),
        ("backward", 192, 2): (1024, 1024, 256, 256, 1),
        ("forward", 256, 2): (1024, 1024, 256, 256, 1),
        ("backward", 256, 2): (1024, 1024, 256, 256, 1),
        ("forward", 64, 4): (512, 512, 128, 256, 1),
        ("backward", 64, 4): (512, 512, 256, 256, 1),
        ("forward", 128, 4): (512, 512, 128, 256, 1),
        ("backward", 128, 4): (512, 512, 256, 256, 1),
        ("forward", 256, 4): (512, 512, 128, 256, 1),
        ("backward", 256, 4): (512, 512, 256, 256, 1),
    },
    "TPU v6 lite": {
        ("forward", 64, 2): (1024, 1024, 512, 512, 1),
        ("backward", 64, 2): (1024, 1024, 256, 256, 2),
        ("forward", 128, 2): (1024, 1024, 512, 512, 1),
        ("backward", 128, 2): (1024, 1024, 256, 256, 2),
        ("forward", 192, 2): (1024, 1024, 256, 512, 2),
        ("backward", 192, 2): (1024, 1024, 256, 256, 2),
        ("forward", 256, 2): (1024, 1024, 512, 512, 1),
        ("backward", 256, 2): (1024, 1024, 256, 256, 2),
        ("forward", 64, 4): (512, 512, 256, 256, 1),
        ("backward", 64, 4): (512, 512, 256, 256, 1),
        ("forward", 128, 4): (512, 512, 256, 256, 1),
        ("backward", 128, 4): (512, 512, 256, 256, 1),
        ("forward", 256, 4): (512, 512, 256, 256, 1),
        ("backward", 256, 4): (512, 512, 256, 256, 1),
    },
}
