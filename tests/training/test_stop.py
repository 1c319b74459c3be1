"""A signal lets a step end, breaks into what can be repeated, and a second one ends the program; hosts of one run stop
after the same step."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from two_processes import address

from para_jax.training.stop import Interrupted, Stopped, interruption_point, stop_signals


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_second_acts_as_usual(number, capfd):
    before = signal.signal(number, lambda number, frame: outside.append(number))
    outside = []
    try:
        with stop_signals() as stop:
            assert not stop.reached(1)
            send(number)
            assert stop.reached(2) and outside == []
            send(number)
            assert outside == [number]
        send(number)
        assert outside == [number, number]
    finally:
        signal.signal(number, before)
    assert "stopping after this step, to save" in capfd.readouterr().err


def test_a_signal_before_or_during_repeatable_work_interrupts_it_at_its_next_point(capfd):
    for while_inside in (True, False):
        done = []
        with stop_signals() as stop, pytest.raises(Interrupted):
            if not while_inside:
                send(signal.SIGTERM)
            with stop.interrupting():
                send(signal.SIGTERM)
                done.append(1)
                interruption_point()
                done.append(2)
        assert done == [1] * while_inside and stop.reached(1)
        said = (
            "stopping; saving first (a second signal" if while_inside else "stopping after this step, to save (a second"
        )
        assert said in capfd.readouterr().err


def test_work_of_no_run_and_of_other_threads_is_not_interrupted():
    with stop_signals() as stop:
        with ThreadPoolExecutor(1) as pool, stop.interrupting():
            send(signal.SIGTERM)
            pool.submit(interruption_point).result()
        interruption_point()


@pytest.mark.parametrize("code", [0, 143])
def test_sigterm_exits_with_the_given_code_and_ctrl_c_as_usual(code):
    for number, raised in ((signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)):
        with stop_signals(exit_code=code) as stop:
            send(number)
            with pytest.raises(raised) as error:
                stop.end()
        assert error.type is KeyboardInterrupt or error.value.code == code


def test_other_threads_receive_no_signal():
    found = []

    def body():
        with stop_signals() as stop:
            found.append(stop.reached(1))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [False] and signal.getsignal(signal.SIGTERM) is before


def test_a_program_with_its_own_handlers_keeps_them():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_signals(given=True) as stop:
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
        assert not stop.reached(1)


def test_hosts_are_asked_about_one_number_after_another_in_all_runs_of_a_process(monkeypatch):
    """The service stops at the next number: a run that begins at another step would jump over it."""
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: asked.append(step) or False)
    for first in (0, 300, 2):
        with stop_signals() as stop:
            assert not any(stop.reached(step) for step in range(first, first + 3))
    assert np.diff(asked).tolist() == [1] * 8


HOST = """
import sys, time
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
jax.devices()
from para_jax.training.stop import stop_signals
with stop_signals() as stop:
    print("ready", flush=True)
    for step in range(1, 3000):
        time.sleep(0.003 + 0.004 * int(sys.argv[2]))
        if stop.reached(step):
            print(step)
            break
"""


@pytest.mark.long
def test_two_hosts_stop_after_the_same_step_when_one_gets_a_signal():
    environment, at = os.environ | {"JAX_PLATFORMS": "cpu"}, address()
    hosts = [
        subprocess.Popen([sys.executable, "-c", HOST, at, str(i)], env=environment, text=True, stdout=subprocess.PIPE)
        for i in range(2)
    ]
    try:
        assert [host.stdout.readline() for host in hosts] == ["ready\n", "ready\n"]
        hosts[1].send_signal(signal.SIGTERM)
        steps = [int(host.communicate(timeout=60)[0]) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert steps[0] == steps[1] < 2999
