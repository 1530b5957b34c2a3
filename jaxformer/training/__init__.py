"""Training: what every experiment shares, and no architecture.

Stepping
    state         what a run carries from step to step
    step          one pure training step, and its wrappers for `jit` and `pmap`
    optimizers    recipes: AdamW or Muon, clipping, weight decay, schedules
    mesh          devices by name, and several of them simulated on a CPU
    interrupts    SIGTERM and Ctrl-C as a flag between two steps

Keeping
    checkpoint    asynchronous checkpoints that survive kills, flipped bits and full disks
    fingerprint   a number for each leaf that changes whenever one of its bits does
    leaves        a tree as the named arrays that a checkpoint stores

Data
    data          `batch(step)` as a pure function of seed, step and host
    mnist         handwritten digits: embedded, from IDX files, or from tensorflow-datasets

Telling
    run           the folder of a run: config, metrics, TensorBoard events, profile, report
    records       lines of metrics that a resumed run goes on with
    progress      step, loss, speed and time left
    pictures      grids of images and curves, as PNG files
"""
