import contextlib
import os
import signal
import threading

import jax
import pytest
from jax.experimental import multihost_utils

from jaxformer.training import interrupts


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_becomes_a_flag_and_its_name(name):
    with interrupts.Interrupts() as caught:
        assert caught.requested is None
        assert not caught.reached(3)
        send(signal.Signals[name])
        assert caught.requested == name
        assert caught.reached(3)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_another_signal_ends_the_program_at_once(first):
    with interrupts.Interrupts() as caught:
        send(first)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        send(signal.SIGTERM)
        assert caught.requested == first.name


def test_the_handlers_before_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with contextlib.suppress(KeyError), interrupts.Interrupts():
        assert signal.getsignal(signal.SIGTERM) != before[0]
        raise KeyError
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_several_processes_agree_through_jax_and_catch_nothing(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step == 5)
    with interrupts.Interrupts() as caught:
        assert signal.getsignal(signal.SIGTERM) is before
        assert [step for step in range(9) if caught.reached(step)] == [5]


def test_another_thread_than_the_main_one_is_refused():
    errors = []

    def enter():
        try:
            with interrupts.Interrupts():
                pass
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in errors[0]
