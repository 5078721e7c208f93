"""The convention of users' reward files, in this process, since these files do nothing."""

import math
import re

import pytest

from rewards.base import RewardInput
from rewards.reward_file import load_reward_file

GOOD = """
import beside
from beside import reward_of_another_file

RANGES = {"short": (0, 1)}
WEIGHTS = {"long": 0.5}

def helper(text):
    return len(text)

def reward_short(completion, **columns):
    return float(helper(completion) < beside.LIMIT)

def reward_long(completion, answer, level=1):
    return helper(completion) * level + helper(answer)

reward_ = reward_of_another_file
reward_number = 5
"""


def written(tmp_path, source):
    file = tmp_path / "mine.py"
    file.write_text(source)
    return file


def test_functions_with_the_prefix_are_rewards_in_the_files_order(tmp_path):
    (tmp_path / "beside.py").write_text("LIMIT = 4\ndef reward_of_another_file(): return 1\n")
    short, long = load_reward_file(written(tmp_path, GOOD))
    assert (short.name, short.weight, short.low, short.high) == ("short", 1.0, 0.0, 1.0)
    assert (long.name, long.weight, long.low, long.high) == ("long", 0.5, -math.inf, math.inf)
    item = RewardInput("q", "abc", "72", {"level": 10, "other": "x"})
    assert short(item) == 1.0
    assert long(item) == 3 * 10 + 2


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("RANGES = {'b': (0, 1)}", "RANGES['b']: the file defines no reward_b; its rewards are a"),
        ("RANGES = {'a': (1, 0)}", "RANGES['a']=(1, 0): a range is (low, high)"),
        ("RANGES = {'a': 1}", "RANGES['a']=1: a range is (low, high)"),
        ("RANGES = [0, 1]", "RANGES=[0, 1]: it is keyed by reward"),
        ("WEIGHTS = {'a': 'much'}", "WEIGHTS['a']='much': a weight is a finite number"),
        ("WEIGHTS = {'a': 1e31}", "WEIGHTS['a']=1e+31: a weight is a finite number, at most 1e+30"),
        ("WEIGHTS = {'a': float('nan')}", "WEIGHTS['a']=nan: a weight is a finite number"),
        ("def reward_b(completion, /): return 1", "reward_b: completion: columns are passed by name"),
        ("def reward_b(*all): return 1", "reward_b: *all: columns are passed by name"),
    ],
)
def test_a_file_that_breaks_the_convention_is_refused(tmp_path, source, said):
    file = written(tmp_path, f"def reward_a(completion): return 1\n{source}\n")
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        load_reward_file(file)
    assert str(refused.value).startswith(f"reward file {file}: ")


def test_a_missing_file_and_one_that_is_not_python_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        load_reward_file(tmp_path / "absent.py")
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ValueError, match=r"give it the suffix \.py"):
        load_reward_file(tmp_path / "mine.txt")
