"""Training: what every experiment shares, and no architecture.

Running
    step          one pure training step, and its wrappers for `jit` and `pmap`
    optimizers    recipes: AdamW, Muon, warm-up and cosine, clipping
    mesh          devices by name, and how arrays lie on them
    interrupts    SIGTERM and Ctrl-C as a flag between two steps

Keeping
    checkpoint    asynchronous checkpoints that survive kills, flipped bits and full disks
    fingerprint   a number for each leaf that changes whenever one of its bits does
    leaves        a tree as the named arrays that a checkpoint stores
    metrics       numbers of a run, one JSON line a step

Data
    data          `batch(step)` as a pure function of seed, step and host
    mnist         handwritten digits: embedded, from IDX files, or from tensorflow-datasets
"""
