"""Running a plan: a real tiny model in this process, with engines that lie where a test wants a mismatch."""

import msgspec
import numpy as np
import pytest
import tiny_llama

from lightvllm.engine.llm import LLM
from lightvllm.errors import ConfigError
from lightvllm.messages import Tensor
from lightvllm.parity.prompts import Prompt
from lightvllm.parity.run import Layout, Plan, parse_executors, parse_layouts, run_parity

PROMPTS = [
    Prompt(prompt="The quick brown"),
    Prompt(messages=[{"role": "user", "content": "Paris?"}]),
    Prompt(prompt="1 2 3"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(tiny_llama.build(tmp_path_factory.mktemp("tiny")))


def plan(tiny, **changes):
    fields = {
        "model": tiny,
        "executors": ["uniproc", "ray", "k8s"],
        "layouts": [Layout(1, 1)],
        "prompts": PROMPTS,
        "max_tokens": 4,
        "threads": 1,
        "options": {name: {"kernels": "reference"} for name in ("uniproc", "ray", "k8s")},
    }
    return Plan(**(fields | changes))


class Engines:
    """Makes an in-process engine whatever executor is asked for; ``tamper`` may change what its steps report."""

    def __init__(self, tamper=None):
        self.tamper = tamper
        self.asked = []
        self.alive = 0
        self.most_alive = 0

    def __call__(self, model, *, executor, on_step, **options):
        self.asked.append((executor, options))
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        made = LLM(
            model,
            on_step=lambda step, output, batch: on_step(step, self._tampered(executor, output), batch),
            **(options | {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}),
        )
        end = made.shutdown

        def shutdown():
            end()
            self.alive -= 1

        made.shutdown = shutdown
        return made

    def _tampered(self, executor, output):
        if self.tamper is None or output.logits is None:
            return output
        logits = output.logits.numpy().copy()
        self.tamper(executor, output.step, logits)
        return msgspec.structs.replace(
            output, logits=Tensor("float32", list(logits.shape), np.ascontiguousarray(logits).tobytes())
        )


def test_three_that_agree(tiny):
    engines, said = Engines(), []
    report = run_parity(plan(tiny), said.append, engines)
    assert report.identical
    assert [run.name for run in report.runs] == ["uniproc 1x1", "ray 1x1", "k8s 1x1"]
    assert engines.most_alive == 1, "one engine has ended before the next one starts"
    assert engines.alive == 0
    assert len({run.digest for run in report.runs}) == 1
    for run in report.runs:
        assert run.max_abs_logit_difference < 1e-4
        assert run.timed_token_ids == [answer.token_ids for answer in run.prompts]
        assert run.output_tokens == sum(len(answer.token_ids) for answer in run.prompts) > 0
        assert all(len(a.step_digests) == len(a.step_tops) == len(a.token_ids) for a in run.prompts)
        assert [[top[0].id for top in a.step_tops] for a in run.prompts] == [a.token_ids for a in run.prompts]
        assert run.steps >= max(len(answer.token_ids) for answer in run.prompts)
        assert run.seconds > 0
        assert 0 < run.outside_us_p50 <= run.outside_us_p99
        assert run.threads == 1
    assert report.reference.prompts[0].token_ids == report.runs[0].prompts[0].token_ids
    assert [question.num_tokens for question in report.prompts] == [len(ids) for ids in tokens(tiny)]
    assert "uniproc 1x1: generating, timed" in said


def tokens(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for prompt in PROMPTS:
        if prompt.messages:
            text = tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, tokenize=False)
            yield tokenizer(text, add_special_tokens=False).input_ids
        else:
            yield tokenizer(prompt.prompt).input_ids


def test_twice_gives_the_same_digest(tiny):
    report = run_parity(plan(tiny, executors=["uniproc"], repeat=2, reference="none"), make_llm=Engines())
    assert [run.name for run in report.runs] == ["uniproc 1x1", "uniproc 1x1 (run 2)"]
    assert report.identical
    assert report.reference is None
    assert {run.max_abs_logit_difference for run in report.runs} == {None}


def test_one_bit_is_found_and_named(tiny):
    def tamper(executor, step, logits):
        if executor == "k8s" and len(logits) == 3:  # a step in which all three prompts take part
            logits[1].view(np.uint32)[7] ^= 1

    report = run_parity(plan(tiny), make_llm=Engines(tamper))
    assert not report.identical
    (found,) = report.mismatches
    assert (found.kind, found.left, found.right, found.prompt, found.step) == ("logits", "uniproc 1x1", "k8s 1x1", 1, 0)
    assert [top.id for top in found.left_top] == [top.id for top in found.right_top]


def test_a_model_that_answers_otherwise_is_found(tiny, tmp_path):
    other = str(tiny_llama.build(tmp_path / "other", seed=1))
    engines = Engines()

    def make(model, *, executor, **options):
        return engines(other if executor == "ray" else model, executor=executor, **options)

    report = run_parity(plan(tiny), make_llm=make)
    assert [(m.kind, m.left, m.right) for m in report.mismatches] == [
        ("tokens", "transformers", "ray 1x1"),
        ("logits", "uniproc 1x1", "ray 1x1"),
    ]
    found = report.mismatches[0]
    assert found.left_top[0].id == found.left_token != found.right_token == found.right_top[0].id
    assert report.runs[1].max_abs_logit_difference > 0.1
    assert report.runs[2].max_abs_logit_difference < 1e-4


def test_threads_are_equal_and_share_the_cores(tiny, monkeypatch):
    monkeypatch.setattr("lightvllm.parity.run._cores", lambda: 8)
    engines = Engines()
    layouts = parse_layouts("1x1,2x2,4x1")
    run_parity(plan(tiny, layouts=layouts, threads=0, max_tokens=1, reference="none"), make_llm=engines)
    asked = [
        (executor, f"{o['tensor_parallel_size']}x{o['pipeline_parallel_size']}", o["threads"])
        for executor, o in engines.asked
    ]
    assert asked == [
        ("uniproc", "1x1", 8),
        ("ray", "1x1", 8),
        ("k8s", "1x1", 8),
        ("ray", "2x2", 2),
        ("k8s", "2x2", 2),
        ("ray", "4x1", 2),
        ("k8s", "4x1", 2),
    ]


def test_an_engine_that_fails_is_shut_down(tiny):
    def tamper(executor, step, logits):
        raise ConfigError("no more")

    engines = Engines(tamper)
    with pytest.raises(ConfigError, match="no more"):
        run_parity(plan(tiny, reference="none"), make_llm=engines)
    assert (len(engines.asked), engines.alive) == (1, 0)


def test_a_model_without_a_chat_template_gets_the_words(tmp_path):
    import json

    folder = tiny_llama.build(tmp_path)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["chat_template"]
    file.write_text(json.dumps(settings))
    report = run_parity(plan(str(folder), executors=["uniproc"], max_tokens=1, reference="none"), make_llm=Engines())
    assert report.prompts[1].text == "Paris?"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layouts": [Layout(3, 1)]}, "tensor_parallel_size=3 cannot split this model"),
        ({"layouts": [Layout(1, 9)]}, "pipeline_parallel_size=9 is more than the model's 3 layers"),
        ({"layouts": [Layout(2, 1)], "executors": ["uniproc"]}, "uniproc runs only layout 1x1"),
        ({"reference": "oracle"}, "reference='oracle' is unknown; use transformers or none"),
        ({"model": "no-such-model"}, "no such model folder"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(tiny, changes, words):
    engines = Engines()
    with pytest.raises(ConfigError, match=words):
        run_parity(plan(tiny, **changes), make_llm=engines)
    assert engines.asked == []


def test_lists():
    assert parse_layouts("1x1, 3x2,1x1") == [Layout(1, 1), Layout(3, 2)]
    assert parse_executors("k8s,ray,k8s") == ["k8s", "ray"]
    with pytest.raises(ConfigError, match="executors slurm are unknown"):
        parse_executors("ray,slurm")


@pytest.mark.parametrize("text", ["1", "0x1", "1x0", "x", "1x1x1", "-1x1", "axb"])
def test_no_layout(text):
    with pytest.raises(ConfigError, match="is not TPxPP; write it like 1x1,1x2,3x1"):
        parse_layouts(text)


def test_no_list_at_all():
    with pytest.raises(ConfigError, match="no layouts are given"):
        parse_layouts(" , ")
