"""The counter-based generator: known answers, an oracle in Python integers, backends, statistics, seeds."""

import threading

import numpy as np
import pytest

from xpoptim import random

# Random123's kat_vectors for philox4x32-10: counter, key, answer.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

NAMESPACES = ["numpy", "array_api_strict", "torch", "jax.numpy"]


def oracle_block(counter, key):
    """Philox4x32-10 from the paper: ten S-P rounds, the key bumped between them."""
    left0, right0, left1, right1 = counter[0], counter[1], counter[2], counter[3]
    key0, key1 = key
    for number in range(10):
        if number > 0:
            key0 = (key0 + 0x9E3779B9) % 2**32
            key1 = (key1 + 0xBB67AE85) % 2**32
        high0, low0 = divmod(0xD2511F53 * left0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * left1, 2**32)
        left0, right0, left1, right1 = high1 ^ right0 ^ key0, low1, high0 ^ right1 ^ key1, low0
    return left0, right0, left1, right1


def oracle_words(seed, stream, n, start_block=0):
    answer = []
    for i in range(n):
        block = start_block + i // 4
        counter = (block % 2**32, block // 2**32, stream % 2**32, stream // 2**32)
        answer.append(oracle_block(counter, (seed % 2**32, seed // 2**32))[i % 4])
    return answer


def to_ints(array):
    return [int(word) for word in array]


@pytest.fixture(params=NAMESPACES)
def xp(request):
    return pytest.importorskip(request.param, reason=f"{request.param} is not installed")


@pytest.fixture(autouse=True)
def _no_global_seed():
    yield
    random.seed(None)


@pytest.mark.smoke
class TestPhilox:
    @pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
    def test_known_answers_of_the_oracle(self, counter, key, answer):
        assert oracle_block(counter, key) == answer

    @pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
    def test_known_answers_of_the_rounds_on_python_ints(self, counter, key, answer):
        def mulhilo(constant, lane):
            return divmod(constant * lane, 2**32)

        assert random.philox4x32(counter, random.round_keys(key[1] << 32 | key[0]), mulhilo) == answer

    @pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
    def test_known_answers_as_words(self, xp, counter, key, answer):
        seed, block, stream = key[1] << 32 | key[0], counter[1] << 32 | counter[0], counter[3] << 32 | counter[2]
        assert tuple(to_ints(random.words(seed, stream, 4, xp, start_block=block))) == answer


class TestWords:
    @pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 7, 8, 65])
    def test_against_the_oracle(self, xp, n):
        seed, stream = 0x0123456789ABCDEF, 0x7EDCBA9876543210
        words = random.words(seed, stream, n, xp)
        assert words.shape == (n,)
        assert words.dtype == xp.uint32
        assert to_ints(words) == oracle_words(seed, stream, n)

    def test_numpy_is_the_default_namespace(self):
        words = random.words(1, 2, 9)
        assert type(words) is np.ndarray
        assert to_ints(words) == oracle_words(1, 2, 9)

    def test_the_block_index_crosses_2_to_the_32(self, xp):
        start = 2**32 - 2
        words = to_ints(random.words(5, 6, 15, xp, start_block=start))
        assert words == oracle_words(5, 6, 15, start)
        assert words[8:] == to_ints(random.words(5, 6, 7, xp, start_block=2**32))
        assert words[8:] != to_ints(random.words(5, 6, 7, xp))  # a high word that is lost would repeat block 0

    def test_the_block_index_crosses_2_to_the_31_and_63(self, xp):
        for start in (2**31 - 1, 2**63 - 1, 2**64 - 2):
            assert to_ints(random.words(5, 6, 8, xp, start_block=start)) == oracle_words(5, 6, 8, start)

    @pytest.mark.parametrize("piece", [1, 2, 8, 1 << 14])
    def test_pieces_leave_no_seam(self, monkeypatch, piece):
        whole = random.words(3, 4, 100)
        monkeypatch.setattr(random, "PIECE_ON_HOST", piece)
        np.testing.assert_array_equal(random.words(3, 4, 100), whole)
        np.testing.assert_array_equal(random.words(3, 4, 43, start_block=13), whole[52:95])

    def test_more_than_one_piece_of_the_real_size(self, xp):
        n = 4 * random.PIECE_ON_HOST + 6
        words = random.words(11, 12, n, xp)
        tail = 4 * random.PIECE_ON_HOST - 4
        assert to_ints(words[tail:]) == oracle_words(11, 12, 10, random.PIECE_ON_HOST - 1)

    def test_a_device_is_kept(self):
        strict = pytest.importorskip("array_api_strict", reason="array_api_strict is not installed")
        device = strict.Device("device1")
        words = random.words(1, 2, 3, strict, device=device)
        assert words.device == device
        assert to_ints(words) == oracle_words(1, 2, 3)

    @pytest.mark.parametrize("integer", [np.int64(3), np.uint8(3), np.array(3)])
    def test_numpy_integers_are_integers(self, integer):
        assert to_ints(random.words(integer, integer, integer)) == oracle_words(3, 3, 3)

    @pytest.mark.parametrize("name", ["seed", "stream", "n", "start_block"])
    @pytest.mark.parametrize("value", [True, 1.0, "1", None, np.bool_(True), np.array([1, 2])])
    def test_no_integer(self, name, value):
        with pytest.raises(TypeError, match=rf"^{name} must be an integer in \[0, 2\*\*6[34]\), not "):
            random.words(**{"seed": 0, "stream": 0, "n": 1, name: value})

    @pytest.mark.parametrize("name", ["seed", "stream", "n", "start_block"])
    @pytest.mark.parametrize("value", [-1, 2**64])
    def test_out_of_range(self, name, value):
        with pytest.raises(ValueError, match=rf"^{name} must be an integer in .* not {value}$"):
            random.words(**{"seed": 0, "stream": 0, "n": 1, name: value})

    def test_more_blocks_than_there_are(self):
        with pytest.raises(ValueError, match="start_block=18446744073709551615 leaves fewer than the 2 blocks"):
            random.words(0, 0, 5, start_block=2**64 - 1)


@pytest.mark.smoke
class TestKeepMask:
    @pytest.mark.parametrize("ratio", [0.0, 1e-9, 2**-32, 0.1, 0.5, 1 - 2**-32, 1 - 2**-40, 1.0])
    def test_against_the_oracle(self, xp, ratio):
        keep = random.keep_mask(8, 9, (3, 7), ratio, xp=xp)
        assert keep.shape == (3, 7)
        assert keep.dtype == xp.bool
        expected = [word >= round(ratio * 4294967296.0) for word in oracle_words(8, 9, 21)]
        assert [bool(keep[i, j]) for i in range(3) for j in range(7)] == expected

    @pytest.mark.parametrize("word_is_kept", [True, False])
    def test_the_threshold_itself_is_kept(self, xp, word_is_kept):
        word = oracle_words(8, 9, 1)[0]
        ratio = (word + (not word_is_kept)) / 2**32
        assert bool(random.keep_mask(8, 9, (1,), ratio, xp=xp)[0]) is word_is_kept

    @pytest.mark.parametrize(
        ("ratio", "expected"),
        [
            (0.0, 0),
            (0.1, 429496730),  # from 429496729.6
            (0.3, 1288490189),  # from 1288490188.8
            (0.7, 3006477107),  # from 3006477107.2
            (2.5 / 2**32, 2),
            (3.5 / 2**32, 4),
            (0.5, 2**31),
            (1.0, 2**32),
        ],
    )
    def test_the_threshold_is_rounded_half_to_even_and_does_not_wrap(self, ratio, expected):
        assert random.threshold(ratio) == expected


def five_sigma(n, p):
    return 5 * np.sqrt(n * p * (1 - p))


def correlation_in_sigmas(a, b):
    """Of two sequences of bools or words; about standard normal if they are independent."""
    return np.corrcoef(a.astype("f8"), b.astype("f8"))[0, 1] * np.sqrt(len(a))


class TestStatistics:
    @pytest.mark.parametrize("n", [1_000, 65_537, 1_000_003])
    @pytest.mark.parametrize("ratio", [0.01, 0.1, 0.3, 0.5, 0.75, 0.99])
    def test_keep_rate(self, ratio, n):
        for seed, stream in ((0, 0), (1, 2**32 + 1)):
            kept = int(random.keep_mask(seed, stream, (n,), ratio).sum())
            assert abs(kept - n * (1 - ratio)) <= five_sigma(n, ratio)

    def test_every_bit_is_fair(self):
        n = 200_000
        words = random.words(2026, 0, n)
        for bit in range(32):
            assert abs(int(((words >> bit) & 1).sum()) - n / 2) <= five_sigma(n, 0.5)

    def test_neighbouring_seeds_streams_layers_and_blocks(self):
        n = 100_000
        seed, stream = 41, 6 << 32 | 17
        here = random.words(seed, stream, n)
        neighbours = {
            "seed + 1": random.words(seed + 1, stream, n),
            "seed + 2**32": random.words(seed + 2**32, stream, n),
            "next call": random.words(seed, stream + 1, n),
            "next layer": random.words(seed, stream + 2**32, n),
            "seed and stream exchanged": random.words(stream, seed, n),
            "next block": random.words(seed, stream, n, start_block=1),
            "block + 2**32": random.words(seed, stream, n, start_block=2**32),
        }
        for name, there in neighbours.items():
            assert (here == there).sum() <= 5, name
            assert abs(correlation_in_sigmas(here, there)) < 5, name
            assert abs(correlation_in_sigmas(here < 2**30, there < 2**30)) < 5, name

    @pytest.mark.parametrize("lag", range(1, 9))
    def test_neighbouring_elements(self, lag):
        words = random.words(7, 8, 200_000)
        assert abs(correlation_in_sigmas(words[:-lag], words[lag:])) < 5
        dropped = words < 0.2 * 2**32
        assert abs(correlation_in_sigmas(dropped[:-lag], dropped[lag:])) < 5


@pytest.mark.smoke
class TestGlobalSeed:
    def test_layers_are_numbered_from_zero(self):
        random.seed(5)
        assert [random.claim_layer() for _ in range(3)] == [(5, 0), (5, 1), (5, 2)]
        random.seed(5)
        assert random.claim_layer() == (5, 0)

    def test_numbers_lie_above_a_given_one(self):
        random.seed(5)
        assert random.claim_layer(3) == (5, 3)
        assert random.claim_layer() == (5, 4)
        assert random.claim_layer(1) == (5, 1)
        assert random.claim_layer() == (5, 5)

    def test_without_a_seed_the_operating_system_gives_one(self):
        first, second = random.claim_layer(), random.claim_layer(4)
        assert first[0] != second[0]
        assert (first[1], second[1]) == (0, 4)
        random.seed(1)
        random.seed(None)
        assert random.claim_layer()[0] != 1

    def test_numbers_run_out(self):
        random.seed(5)
        assert random.claim_layer(2**31 - 1) == (5, 2**31 - 1)
        with pytest.raises(ValueError, match=r"no layer number below 2147483648 is free: call xpoptim.random.seed"):
            random.claim_layer()

    @pytest.mark.parametrize(
        ("s", "error"), [(-1, ValueError), (2**64, ValueError), (1.5, TypeError), (True, TypeError)]
    )
    def test_a_bad_seed_changes_nothing(self, s, error):
        random.seed(5)
        random.claim_layer()
        with pytest.raises(error, match=r"^s must be an integer in \[0, 2\*\*64\)"):
            random.seed(s)
        assert random.claim_layer() == (5, 1)

    def test_threads_share_no_number(self):
        random.seed(9)
        claimed, start = [], threading.Barrier(8)

        def claim():
            start.wait()
            claimed.extend(random.claim_layer() for _ in range(500))

        threads = [threading.Thread(target=claim) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(number for _, number in claimed) == list(range(4000))
