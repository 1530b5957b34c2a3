"""Block sizes of the TPU kernels of attention: the best of those compiled, by static schedule.

No chip has run them. Head sizes and dtypes that are missing take the nearest entry. In float32
blocks of 1024 would save 2% of the schedule and take four times as long to compile.
"""

# chip: {(pass, head size, bytes of a number): (query, key, rows, columns, ahead)}
TABLE = {
    "TPU v5 lite": {
        ("forward", 128, 2): (1024, 1024, 128, 512, 1),
        ("backward", 128, 2): (1024, 1024, 256, 256, 2),
        ("forward", 128, 4): (512, 512, 128, 256, 1),
        ("backward", 128, 4): (512, 512, 256, 256, 1),
    },
    "TPU v6 lite": {
        ("forward", 128, 2): (1024, 1024, 512, 512, 1),
        ("backward", 128, 2): (1024, 1024, 256, 256, 2),
        ("forward", 128, 4): (512, 512, 128, 256, 1),
        ("backward", 128, 4): (512, 512, 256, 256, 1),
    },
}
