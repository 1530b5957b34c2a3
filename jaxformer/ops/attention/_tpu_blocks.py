"""Block sizes of the TPU kernels of attention: the best of those compiled, by static schedule.

No chip has run them. Head sizes and dtypes that are missing take the nearest entry.
"""

# chip: {(pass, head size, bytes of a number): (query, key, rows, columns, ahead)}
TABLE = {
    "TPU v5 lite": {
        ("forward", 128, 2): (1024, 1024, 128, 512, 1),
        ("backward", 128, 2): (1024, 1024, 256, 256, 2),
    },
    "TPU v6 lite": {
        ("forward", 128, 2): (1024, 1024, 512, 512, 1),
        ("backward", 128, 2): (1024, 1024, 256, 256, 2),
    },
}
