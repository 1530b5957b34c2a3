"""What the tests of the experiments share."""

import signal

import numpy as np
import pytest

from jaxformer.training import mesh, run


@pytest.fixture(scope="module", autouse=True)
def untouched():
    """Leaves this process's cache and memory as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "enable_compile_cache", lambda: None)
        patch.setattr(mesh, "keep_host_memory", lambda: None)
        yield


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Images of nothing, of two classes."""
    path = tmp_path_factory.mktemp("images") / "noise.npz"
    x = np.random.default_rng(0).integers(0, 256, (80, 28, 20)).astype(np.uint8)
    np.savez(path, x=x, y=np.arange(80) % 2, label_names=np.array(["one", "other"]))
    return f"npz:{path}"


@pytest.fixture
def stopped(capsys):
    """Runs an experiment that a signal stops during a step: `stopped(module, config, step)`."""

    def once(module, cfg, step):
        make = module.jit_step

        def interrupted(pure, devices):
            take = make(pure, devices)

            def taken(state, batch):
                if int(state.step) == step - 1:
                    signal.raise_signal(signal.SIGTERM)
                return take(state, batch)

            return taken

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "jit_step", interrupted)
            assert module.main(cfg) == 0
        assert f"Stopped after step {step}: saved" in capsys.readouterr().out

    return once
