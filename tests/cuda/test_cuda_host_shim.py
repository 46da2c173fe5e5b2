"""The shim that runs CUDA kernels on the host does what CUDA does, and reports what it forbids."""

from __future__ import annotations

import cuda_host_build
import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def samples():
    return cuda_host_build.samples()


@pytest.fixture(autouse=True)
def _same_order_in_every_run(samples):
    samples.set_seed(0)


def test_a_block_meets_in_shared_memory(samples):
    x = np.arange(4 * 128, dtype=np.float32)
    np.testing.assert_array_equal(samples.block_sum(x, 4, 128, 512), x.reshape(4, 128).sum(1))


def test_the_last_block_sees_what_all_wrote(samples):
    assert samples.sum_of_blocks(np.arange(1, 9)) == 36


@pytest.mark.parametrize("name", ["shuffle_float", "shuffle_double"])
@pytest.mark.parametrize("threads", [32, 256])
def test_shuffles(samples, name, threads):
    shuffle = getattr(samples, name)
    mine = np.arange(threads) + 0.25
    lanes, warp = np.arange(threads) % 32, np.arange(threads) // 32 * 32
    for offset in (1, 2, 16, 31):
        got = shuffle(threads, True, offset, 0xFFFFFFFF)
        np.testing.assert_array_equal(got, mine[warp + (lanes ^ offset)])
    for lane in (0, 13, 31):
        np.testing.assert_array_equal(shuffle(threads, False, lane, 0xFFFFFFFF), mine[warp + lane])


def test_shuffles_of_some_lanes(samples):
    got = samples.shuffle_float(32, True, 1, 0x0000FF00)
    expected = np.where(np.arange(32) // 8 == 1, (np.arange(32) ^ 1) + 0.25, -1)
    np.testing.assert_array_equal(got, expected)


def test_the_order_is_shuffled_and_repeats_with_its_seed(samples):
    first = samples.block_order(50), samples.thread_order(64)
    second = samples.block_order(50), samples.thread_order(64)
    for order in (*first, *second):
        assert sorted(order) == list(range(len(order)))
    assert first[0] != second[0]
    assert first[0] != sorted(first[0])
    orders = {tuple(samples.thread_order(64)) for _ in range(20)}
    assert len(orders) > 10
    samples.set_seed(0)
    assert (samples.block_order(50), samples.thread_order(64)) == first


@pytest.mark.parametrize("name", ["half", "bfloat16"])
def test_conversions_round_to_nearest_even(samples, name):
    dtype = torch.float16 if name == "half" else torch.bfloat16
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    bits = every.view(torch.int16).numpy().view(np.uint16)
    wide = torch.from_numpy(getattr(samples, f"widen_{name}")(bits))
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)
    finite = every[every.isfinite()].float()
    steps = torch.stack([finite, finite.roll(1)])
    between = torch.cat([steps.mean(0), steps[0] * 1.0001, torch.tensor([1e30, -1e30, torch.inf])])
    rounded = torch.from_numpy(getattr(samples, f"round_to_{name}")(between.numpy()).view(np.int16))
    assert torch.equal(rounded.view(dtype), between.to(dtype))


# ---- What CUDA forbids ---------------------------------------------------------------------------


def test_shared_memory_is_poisoned_at_the_start(samples):
    assert np.isnan(samples.poison(100)).all()


def test_a_copy_is_not_there_before_it_was_waited_for(samples):
    x = np.arange(8, dtype=np.float32)
    assert np.isnan(samples.copy_two(x, False)).all()
    np.testing.assert_array_equal(samples.copy_two(x, True), x)


def test_a_copy_that_nobody_waits_for(samples):
    with pytest.raises(RuntimeError, match="thread 5: exits with asynchronous copies"):
        samples.copy_without_wait()


@pytest.mark.parametrize(
    ("target", "source", "message"),
    [
        (8, 0, "target is not aligned to 16 bytes"),
        (0, 4, "source is not aligned to 16 bytes"),
        (32, 0, "target is not in the block's shared memory"),
        (-16, 0, "target is not in the block's shared memory"),
    ],
)
def test_a_copy_to_or_from_the_wrong_place(samples, target, source, message):
    with pytest.raises(RuntimeError, match=message):
        samples.copy_to(target, source)


@pytest.mark.parametrize("size", [0, 1, 16, 1000])
def test_writing_beyond_shared_memory(samples, size):
    with pytest.raises(RuntimeError, match=rf"block 1: byte 0 after the block's {size} bytes"):
        samples.write_beyond_shared_memory(size)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent_block", r"1 thread finished \(first: 40\).* 63 threads .*__syncthreads|"
                            r"63 threads in __syncthreads \(first: 0\) 1 thread finished"),
        ("divergent_warp", "31 threads in __shfl_xor_sync"),
        ("crossed_meetings", "10 threads in __shfl_sync"),
        ("crossed_shuffles", "while other lanes of its mask are in __shfl"),
        ("shuffle_outside_of_the_mask", "from a lane that does not take part"),
    ],
)  # fmt: skip
def test_divergent_meetings(samples, name, message):
    for _ in range(5):  # in several orders
        with pytest.raises(RuntimeError, match=message):
            getattr(samples, name)()


@pytest.mark.parametrize("threads", [0, 1025])
def test_impossible_launches(samples, threads):
    with pytest.raises(RuntimeError, match=f"cannot launch 1 block of {threads} threads"):
        samples.block_sum(np.zeros(2000), 1, threads, 4 * threads)


def test_an_exception_of_one_thread_reaches_the_caller(samples):
    with pytest.raises(IndexError, match="thrown by thread 9"):
        samples.throw_in_thread()
    assert samples.sum_of_blocks(np.ones(3)) == 3  # and the next launch works


def test_messages_name_the_kernel(samples):
    with pytest.raises(RuntimeError, match=r"samples::block_sum\(.*block 0: byte 0 after"):
        samples.block_sum(np.zeros(64), 1, 64, 4 * 63)


# ---- The race detector ---------------------------------------------------------------------------

PLANTED = {
    1: ("no barrier of the block", "block_sum"),
    2: ("a shuffle in place of a barrier", "rotate_warps"),
    3: ("no fence before the mark", "sum_of_blocks"),
    4: ("no barrier after a copy", "copy_and_rotate"),
    5: ("blocks write the same element", "block_sum"),
    6: ("one barrier of several left out", "block_sum"),
    7: ("no fence after the mark", "sum_of_blocks"),
}


def run_planted(number):
    program = cuda_host_build.build_sanitized("planted_race.cpp")
    return cuda_host_build.run_sanitized(program, str(number))


def test_right_kernels_have_no_race():
    done = run_planted(0)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("number", PLANTED, ids=[what for what, _ in PLANTED.values()])
def test_a_planted_race_is_found(number):
    done = run_planted(number)
    assert done.returncode == 66, done.stdout + done.stderr
    reports = [line for line in done.stderr.splitlines() if line.startswith("SUMMARY")]
    assert reports
    assert all("data race" in line and PLANTED[number][1] in line for line in reports)


def run_kernels(dtype, *arguments):
    program = cuda_host_build.build_sanitized("kernel_races.cpp", dtype)
    done = cuda_host_build.run_sanitized(program, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_the_kernels_of_the_loss_have_no_race():
    assert len(run_kernels("float32", "quick")) >= 2  # cases


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_the_kernels_of_the_loss_have_no_race_in_any_case(dtype):
    assert len(run_kernels(dtype)) > len(run_kernels(dtype, "quick"))
