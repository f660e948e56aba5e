"""The comparison, with made-up runs: what is found, what is not, and how it is named."""

import hashlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightvllm.parity.compare import Mismatch, PromptRun, Run, TopToken, compare, first_difference


def answer(tokens, flavour=""):
    """Digests and tops follow from the tokens and a flavour, as logits would."""
    return PromptRun(
        text=str(tokens),
        token_ids=list(tokens),
        step_digests=[hashlib.sha256(f"{flavour}{t}".encode()).hexdigest() for t in tokens],
        step_tops=[[TopToken(t, f"<{t}>", float(t)), TopToken(t + 1, f"<{t + 1}>", 0.5)] for t in tokens],
    )


def run(executor, layout="1x1", prompts=((1, 2, 3), (4, 5)), flavour="", digest="d", repeat=1):
    return Run(
        executor=executor,
        layout=layout,
        repeat=repeat,
        prompts=[answer(tokens, flavour) for tokens in prompts],
        digest=digest + flavour,
    )


REFERENCE = Run(
    executor="transformers", layout="", prompts=[PromptRun(text="", token_ids=list(t)) for t in ((1, 2, 3), (4, 5))]
)


def test_parity():
    runs = [run("uniproc"), run("ray"), run("k8s"), run("ray", "2x1", flavour="x"), run("k8s", "2x1", flavour="x")]
    assert compare(runs, REFERENCE) == []
    assert compare(runs) == []


def test_layouts_may_differ_in_their_bits_but_not_in_their_tokens():
    assert compare([run("ray"), run("ray", "2x1", flavour="x")]) == []
    (found,) = compare([run("ray"), run("ray", "2x1", prompts=((1, 2, 3), (4, 6)))])
    assert (found.kind, found.left, found.right, found.prompt, found.step) == ("tokens", "ray 1x1", "ray 2x1", 1, 1)


def test_a_token_that_differs_from_the_reference():
    (found,) = compare([run("ray", prompts=((1, 2, 9), (4, 8)))], REFERENCE)
    assert found == Mismatch(
        kind="tokens",
        left="transformers",
        right="ray 1x1",
        prompt=0,
        step=2,
        left_token=3,
        right_token=9,
        left_top=[],
        right_top=[TopToken(9, "<9>", 9.0), TopToken(10, "<10>", 0.5)],
    )
    assert found.sentence() == (
        "the tokens of transformers and ray 1x1 differ at prompt 1, step 3: token 3 against token 9"
    )


def test_an_answer_that_ends_early():
    (found,) = compare([run("ray", prompts=((1, 2, 3), (4,)))], REFERENCE)
    assert (found.prompt, found.step, found.left_token, found.right_token) == (1, 1, 5, None)
    assert found.sentence().endswith("at prompt 2, step 2: token 5 against the end")


def test_the_same_tokens_from_other_logits():
    (found,) = compare([run("ray"), run("k8s", flavour="x")], REFERENCE)
    assert (found.kind, found.left, found.right, found.prompt, found.step) == ("logits", "ray 1x1", "k8s 1x1", 0, 0)
    assert (found.left_top, found.right_top) == ([TopToken(1, "<1>", 1.0), TopToken(2, "<2>", 0.5)],) * 2
    assert found.sentence() == "the logits of ray 1x1 and k8s 1x1 differ at prompt 1, step 1"


def test_one_step_of_one_prompt():
    other = run("k8s")
    other.prompts[1].step_digests[1] = "0" * 64
    (found,) = compare([run("ray"), other], REFERENCE)
    assert (found.kind, found.prompt, found.step) == ("logits", 1, 1)


def test_the_same_logits_in_other_steps():
    (found,) = compare([run("ray"), run("k8s", digest="other")], REFERENCE)
    assert (found.kind, found.prompt) == ("schedule", None)
    assert found.sentence() == "ray 1x1 and k8s 1x1 computed the same logits, but not in the same steps"


def test_repeats_are_compared_and_named():
    (found,) = compare([run("ray"), run("ray", repeat=2, flavour="x")], REFERENCE)
    assert (found.left, found.right) == ("ray 1x1", "ray 1x1 (run 2)")


def test_tokens_and_logits_are_two_mismatches():
    found = compare([run("uniproc"), run("ray"), run("k8s", prompts=((1, 7, 3), (4, 5)))], REFERENCE)
    assert [(m.kind, m.left, m.right, m.prompt, m.step) for m in found] == [
        ("tokens", "transformers", "k8s 1x1", 0, 1),
        ("logits", "uniproc 1x1", "k8s 1x1", 0, 1),
    ]


def test_a_run_that_said_something_else_while_it_was_timed():
    timed = [[1, 2, 3], [4, 6]]
    assert compare([msgspec.structs.replace(run("ray"), timed_token_ids=[[1, 2, 3], [4, 5]])], REFERENCE) == []
    (found,) = compare([msgspec.structs.replace(run("ray"), timed_token_ids=timed)], REFERENCE)
    assert (found.kind, found.left, found.right, found.prompt) == ("tokens", "ray 1x1 (timed)", "ray 1x1", 1)
    assert (found.left_token, found.right_token) == (6, 5)


def test_runs_that_cannot_be_compared():
    with pytest.raises(ValueError, match="ray 1x1: not as many prompts as uniproc 1x1"):
        compare([run("uniproc"), run("ray", prompts=((1, 2, 3),))])


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_first_difference(left, right):
    at = first_difference(left, right)
    if at is None:
        assert left == right
    else:
        assert left[:at] == right[:at]
        assert left[at : at + 1] != right[at : at + 1]
