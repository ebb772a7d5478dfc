"""The MLX engine against mlx-lm itself, on a tiny random model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from promptmill.errors import DeviceError, ModelError, RequestError
from promptmill.types import ErrorClass, FinishReason, Message, SamplingParams
from promptmill_workers.checkpoints import bundled
from promptmill_workers.engines.contract import Engine, EngineOptions, EngineRequest, Event, Finished, Rejected
from promptmill_workers.host.process import wrapped
from tests.conftest import ROOT
from tests.unit.tiny_mlx import write_tiny_mlx

pytest.importorskip("mlx_lm", reason="MLX is not installed: pip install 'promptmill[mlx]'")

from promptmill_workers.engines.mlx_lm.backend import MlxBackend
from promptmill_workers.engines.mlx_lm.text import MlxAnswerText, MlxTokenizer
from promptmill_workers.engines.scheduler import Scheduler
from tests.engine_runs import finished, run, texts

RULES = "Is this comment an advertisement? Answer with JSON such as the one below, and nothing else. "

WORDS = ("Subscribe to my channel", "what a voice", "加我微信领取优惠券", "The second verse", "a free phone")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_mlx(tmp_path_factory.mktemp("mlx") / "tiny")


@pytest.fixture
def load(folder: Path) -> Iterator[Callable[..., Engine]]:
    """Loads the tiny model with the options given, and closes it."""
    loaded: list[Engine] = []

    def load(slots: int = 4, **options: Any) -> Engine:
        loaded.append(Scheduler(MlxBackend.load(folder, "tiny", EngineOptions(slots=slots, **options))))
        return loaded[-1]

    yield load
    for engine in loaded:
        engine.close()


def chat(key: int, *, system: str = RULES, text: str | None = None, **sampling: Any) -> EngineRequest:
    user = text or f"{WORDS[key % len(WORDS)]} {key} " * (1 + key % 4)
    settings = SamplingParams(**{"max_tokens": 12, **sampling})
    return EngineRequest(key, settings, messages=(Message("system", system), Message("user", user)))


def tokens_of_mlx_lm(folder: Path, prompts: Sequence[str], most: int) -> list[list[int]]:
    """What mlx-lm generates for each prompt alone, greedily."""
    from mlx_lm import load as load_model
    from mlx_lm import stream_generate

    model, tokenizer = load_model(str(folder))
    encoded = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    return [[each.token for each in stream_generate(model, tokenizer, ids, max_tokens=most)] for ids in encoded]


def test_a_batch_says_what_mlx_lm_says_one_at_a_time(load: Callable[..., Engine], folder: Path) -> None:
    engine = load(slots=4)
    requests = [chat(key, max_tokens=16) for key in range(11)]
    alone = tokens_of_mlx_lm(folder, [engine.render(request) for request in requests], most=16)
    words = MlxTokenizer(folder)

    together = run(engine, requests)

    assert texts(together) == {key: words.text(ids).removesuffix("\ufffd") for key, ids in enumerate(alone)}
    assert [finished(together[key]).usage.output_tokens for key in range(11)] == [len(ids) for ids in alone]
    assert engine.counters.peak_active == 4


def test_prompts_longer_than_a_pass_are_answered_alike(load: Callable[..., Engine], folder: Path) -> None:
    requests = [chat(key, system="", text="one two three free phone! " * (1 + 7 * key)) for key in range(6)]
    expected = texts(run(load(slots=1), requests))

    assert texts(run(load(slots=3, batch_tokens=24), requests)) == expected


def test_sharing_a_prefix_changes_no_text_and_computes_it_once(load: Callable[..., Engine]) -> None:
    alone = {key: texts(run(load(slots=1), [chat(key)]))[key] for key in range(9)}
    engine = load(slots=4)

    events = run(engine, [chat(key) for key in range(9)])

    assert texts(events) == alone
    usage = [finished(event).usage for event in events.values()]
    assert Counter(each.cached_tokens > 40 for each in usage) == {True: 8, False: 1}
    assert engine.counters.prefill_tokens == sum(each.prompt_tokens - each.cached_tokens for each in usage)


def test_a_prefix_of_scored_texts_is_counted_once(load: Callable[..., Engine]) -> None:
    engine = load(slots=4)

    events = run(engine, [chat(99), *(replace(chat(key), continuation=" yes") for key in range(6))])

    usage = [finished(event).usage for event in events.values()]
    assert engine.counters.prefill_tokens == sum(each.prompt_tokens - each.cached_tokens for each in usage)


def test_two_prefixes_are_kept_apart(load: Callable[..., Engine]) -> None:
    systems = [RULES, "The quick brown fox jumps over the lazy dog; one two three four five six seven eight nine."]
    requests = [chat(key, system=systems[key % 2]) for key in range(8)]
    alone = {request.key: texts(run(load(slots=1), [request]))[request.key] for request in requests}

    events = run(load(slots=4), requests)

    assert texts(events) == alone
    assert sum(finished(event).usage.cached_tokens == 0 for event in events.values()) == 2


def test_a_prefix_is_found_again_by_a_later_request(load: Callable[..., Engine]) -> None:
    engine = load(slots=2)
    alone = texts(run(load(slots=2), [chat(7)]))
    run(engine, [chat(0), chat(1)])

    later = run(engine, [chat(7)])

    assert finished(later[7]).usage.cached_tokens > 40
    assert texts(later) == alone


def test_few_cells_slow_a_job_down_and_lose_nothing(load: Callable[..., Engine]) -> None:
    requests = [chat(key) for key in range(8)]
    expected = texts(run(load(), requests))
    engine = load(slots=4, kv_cells=300, context_tokens=300)

    events = run(engine, requests)

    assert texts(events) == expected
    assert engine.counters.peak_kv_cells <= 300
    assert sum(finished(event).usage.cached_tokens > 0 for event in events.values()) == 7


def test_neighbours_do_not_change_what_a_seed_draws(load: Callable[..., Engine]) -> None:
    drawn: dict[str, Any] = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "max_tokens": 20}
    alone = texts(run(load(slots=1), [chat(3, seed=11, **drawn)]))[3]
    mixed = [
        chat(0),
        chat(1, seed=1, **drawn),
        chat(3, seed=11, **drawn),
        chat(4, temperature=2.0, max_tokens=5),
        chat(5),
    ]

    assert texts(run(load(slots=3), mixed))[3] == alone


def test_seeds_differ_and_no_seed_is_drawn_anew(load: Callable[..., Engine]) -> None:
    engine = load(slots=8)
    text = "what a voice"
    hot: dict[str, Any] = {"temperature": 1.5, "max_tokens": 16}
    requests = [chat(key, text=text, seed=seed, **hot) for key, seed in enumerate([1, 1, 2, None, None])]

    said = texts(run(engine, requests))

    assert said[0] == said[1]
    assert len({said[0], said[2], said[3], said[4]}) == 4


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}])
def test_the_narrowest_sampling_is_greedy(load: Callable[..., Engine], narrow: dict[str, Any]) -> None:
    engine = load(slots=2)
    greedy = texts(run(engine, [chat(2)]))

    assert texts(run(engine, [chat(2, **{"temperature": 1.0, "seed": 5, **narrow})])) == greedy


def test_a_top_k_above_the_vocabulary_keeps_everything(load: Callable[..., Engine]) -> None:
    engine = load(slots=2)
    hot: dict[str, Any] = {"temperature": 1.0, "seed": 5}

    assert texts(run(engine, [chat(2, top_k=1_000_000, **hot)])) == texts(run(engine, [chat(2, **hot)]))


def test_the_text_ends_before_a_stop_text_that_spans_tokens(load: Callable[..., Engine]) -> None:
    engine = load(slots=4)
    whole = finished(run(engine, [chat(1, max_tokens=24)])[1])
    stop = whole.text[5:9]
    at = whole.text.index(stop)

    event = finished(run(engine, [chat(1, max_tokens=24, stop=("never said", stop))])[1])

    assert event.text == whole.text[:at]
    assert event.finish_reason is FinishReason.STOP
    assert event.usage.output_tokens < whole.usage.output_tokens


def test_a_stop_frees_its_slot_for_the_next_request(load: Callable[..., Engine]) -> None:
    engine = load(slots=1)
    first = finished(run(engine, [chat(1)])[1]).text[:1]

    events = run(engine, [chat(1, stop=(first,), max_tokens=400), chat(2)])

    assert finished(events[1]).text == ""
    assert finished(events[2]).usage.output_tokens == 12
    assert engine.active == 0


def test_stops_are_found_across_characters_of_several_tokens(folder: Path) -> None:
    words = MlxTokenizer(folder)
    said = "好听 naïve 😀😀 end"
    ids = words.tokens(EngineRequest(0, SamplingParams(), prompt=said)).tolist()
    assert len(ids) > len(said)
    answer = MlxAnswerText(words, ("听 naïve 😀😀 e",))

    read = next(count for count, token in enumerate(ids, start=1) if answer.add(token))

    assert read == len(ids) - len(words.tokens(EngineRequest(0, SamplingParams(), prompt="nd")))
    assert answer.finish() == ("好", False)


def test_an_answer_in_pieces_is_the_answer_in_one(folder: Path) -> None:
    words = MlxTokenizer(folder)
    ids = words.tokens(EngineRequest(0, SamplingParams(), prompt=" 加我微信 a\n\n  b 😀 é , . ")).tolist()
    answer = MlxAnswerText(words, ("not in it",))

    stops = [answer.add(token) for token in ids]

    assert not any(stops)
    assert answer.finish() == (words.text(ids), False) == (" 加我微信 a\n\n  b 😀 é , . ", False)


def test_a_character_cut_in_the_middle_is_left_out(folder: Path) -> None:
    words = MlxTokenizer(folder)
    ids = words.tokens(EngineRequest(0, SamplingParams(), prompt="ab😀")).tolist()[:-1]
    whole, watched = MlxAnswerText(words, ()), MlxAnswerText(words, ("zzz",))
    for token in ids:
        whole.add(token)
        watched.add(token)

    assert whole.finish()[0] == watched.finish()[0] == "ab"


def test_an_end_token_ends_the_answer_unless_it_is_ignored(
    load: Callable[..., Engine], folder: Path, tmp_path: Path
) -> None:
    ids = tokens_of_mlx_lm(folder, [load().render(chat(0))], most=8)[0]
    ending = tmp_path / "ending"
    write_tiny_mlx(ending)
    # The fourth token that the model draws becomes one that ends answers.
    (ending / "generation_config.json").write_text(f'{{"eos_token_id": [{ids[3]}]}}')
    engine = Scheduler(MlxBackend.load(ending, "ending", EngineOptions(slots=2)))

    events = run(engine, [chat(0, max_tokens=8), chat(1), replace(chat(0, max_tokens=8, ignore_eos=True), key=2)])
    engine.close()

    ended, ignored = finished(events[0]), finished(events[2])
    end = ids.index(ids[3]) + 1
    assert (ended.finish_reason, ended.usage.output_tokens) == (FinishReason.STOP, end)
    assert (ignored.finish_reason, ignored.usage.output_tokens) == (FinishReason.LENGTH, 8)
    assert ended.text == MlxTokenizer(folder).text(ids[: end - 1])


def test_max_tokens_is_kept_and_the_context_bounds_it(load: Callable[..., Engine]) -> None:
    engine = load(slots=2, context_tokens=128)

    events = run(engine, [chat(0, max_tokens=1), chat(1, max_tokens=100_000, ignore_eos=True)])

    assert finished(events[0]).usage.output_tokens == 1
    usage = finished(events[1]).usage
    assert usage.prompt_tokens + usage.output_tokens == 128
    assert finished(events[1]).finish_reason is FinishReason.LENGTH


def test_a_prompt_that_cannot_fit_is_one_requests_error(load: Callable[..., Engine]) -> None:
    events = run(load(context_tokens=128), [chat(0), chat(1, text="free phone " * 200), chat(2)])

    refused = events[1]
    assert isinstance(refused, Rejected)
    assert refused.error_class is ErrorClass.CONTEXT_OVERFLOW
    assert "128" in refused.message
    assert "free phone" not in refused.message
    assert {type(events[0]), type(events[2])} == {Finished}


def test_a_request_that_takes_too_long_ends_as_a_timeout(load: Callable[..., Engine]) -> None:
    engine = load(slots=2)

    events = run(engine, [chat(0, timeout_s=0.0, max_tokens=400, ignore_eos=True), chat(1)])

    late = events[0]
    assert isinstance(late, Rejected)
    assert late.error_class is ErrorClass.TIMEOUT
    assert late.usage is not None
    assert late.admitted_at is not None
    assert finished(events[1]).usage.output_tokens == 12


def test_a_cancelled_request_frees_its_slot_and_is_heard_of_no_more(load: Callable[..., Engine]) -> None:
    engine = load(slots=1)
    alone = texts(run(load(slots=1), [chat(1)]))
    engine.add([chat(0, max_tokens=400, ignore_eos=True)])
    early = [*engine.step()]
    engine.add([chat(1), chat(2)])
    early += [event for _ in range(5) for event in engine.step()]
    assert (early, engine.active, engine.waiting) == ([], 1, 2)
    assert set(engine.waiting_keys()) == {1, 2}

    for key in (0, 2, 99):
        engine.cancel(key)
    assert (engine.active, engine.waiting) == (0, 1)
    events = run(engine, [])

    assert texts(events) == alone
    assert engine.counters.wasted_tokens > 0


def test_cancelling_while_prompts_are_computed_leaves_the_others_whole(load: Callable[..., Engine]) -> None:
    requests = [chat(key, system="", text="one two three four " * (5 + key)) for key in range(4)]
    alone = {request.key: texts(run(load(slots=1), [request]))[request.key] for request in requests}
    engine = load(slots=4, batch_tokens=32)
    engine.add(requests)
    engine.step()

    engine.cancel(2)

    assert texts(run(engine, [])) == {key: text for key, text in alone.items() if key != 2}


def test_the_books_balance(load: Callable[..., Engine]) -> None:
    engine = load(slots=3)
    events = run(engine, [*(chat(key, temperature=key / 4) for key in range(7)), chat(7, timeout_s=0.0)])

    counters = engine.counters
    ended = [event for event in events.values() if isinstance(event, Finished)]
    used = [event.usage for event in ended if event.usage]
    assert counters.decode_tokens == sum(usage.output_tokens for usage in used)
    assert counters.wasted_tokens == sum(
        e.usage.output_tokens for e in events.values() if isinstance(e, Rejected) and e.usage
    )
    for event in events.values():
        if isinstance(event, Finished):
            assert event.admitted_at <= event.first_token_at <= event.finished_at
            assert event.usage.cached_tokens < event.usage.prompt_tokens
    assert min(counters.prefill_s, counters.decode_s, counters.overhead_s, counters.idle_s) > 0


def test_a_step_without_work_returns_at_once(load: Callable[..., Engine]) -> None:
    engine = load()

    assert list(engine.step()) == []
    assert engine.counters.steps == 0


def test_a_raw_prompt_is_taken_as_it_is(load: Callable[..., Engine], folder: Path) -> None:
    request = EngineRequest(0, SamplingParams(max_tokens=4), prompt="Say <|im_end|> now")
    engine = load()

    assert engine.render(request) == request.prompt
    assert finished(run(engine, [request])[0]).usage.prompt_tokens == len(MlxTokenizer(folder).tokens(request))


def test_requests_that_cannot_be_prompts_are_refused_one_by_one(load: Callable[..., Engine], tmp_path: Path) -> None:
    mute = write_tiny_mlx(tmp_path / "mute", chat_template=None)
    engine = Scheduler(MlxBackend.load(mute, "mute", EngineOptions(slots=2)))
    empty = EngineRequest(1, SamplingParams(), prompt="")
    odd = EngineRequest(2, SamplingParams(max_tokens=2), prompt="half a pair \ud83d here")

    events = run(engine, [chat(0), empty, odd])
    engine.close()

    for key, reason in ((0, "no chat template"), (1, "no tokens")):
        refused = events[key]
        assert isinstance(refused, Rejected)
        assert refused.error_class is ErrorClass.INVALID_REQUEST
        assert reason in refused.message
    assert finished(events[2]).usage.output_tokens == 2


def test_a_chat_template_cannot_reach_the_machine(tmp_path: Path) -> None:
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    words = MlxTokenizer(write_tiny_mlx(tmp_path / "evil", chat_template=escape))

    with pytest.raises(RequestError, match="refuses the messages"):
        words.render(chat(0))


def test_what_was_set_up_is_told(load: Callable[..., Engine]) -> None:
    info = load(slots=3).info

    assert (info.engine, info.model_name, info.slots, info.context_tokens) == ("mlx", "tiny", 3, 512)
    assert (info.device_got, info.layers, info.layers_offloaded) == ("cpu", 2, 0)
    assert info.version.startswith("0.32")


@pytest.mark.parametrize("device", ["metal", "cuda:0"])
def test_a_device_that_is_not_here_is_refused(folder: Path, device: str) -> None:
    import mlx.core as mx

    if mx.metal.is_available() if device == "metal" else mx.cuda.is_available():
        pytest.skip(f"this machine has {device}")
    with pytest.raises(DeviceError, match=device):
        MlxBackend.load(folder, "tiny", EngineOptions(device=device))


def _without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _with_half_the_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def _with_noise_for_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no weights at all" * 10)


def _with_noise_for_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def _of_an_unknown_kind(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"no_such_kind"'))


def _with_code_of_its_own(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"model_file": "evil.py",', 1))
    (folder / "evil.py").write_text("raise SystemExit('code of the model has run')")


@pytest.mark.parametrize(
    "spoil",
    [
        _without_config,
        _without_weights,
        _with_half_the_weights,
        _with_noise_for_weights,
        _with_noise_for_a_tokenizer,
        _of_an_unknown_kind,
        _with_code_of_its_own,
    ],
)
def test_a_spoilt_folder_is_one_clear_error(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    folder = write_tiny_mlx(tmp_path / "spoilt")
    spoil(folder)

    with pytest.raises(ModelError) as caught:
        MlxBackend.load(folder, "spoilt", EngineOptions())

    assert "spoilt" in caught.value.message
    assert "\n" not in caught.value.message


def test_tokens_are_counted_without_mlx(folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from promptmill.types import SamplingParams;"
        "from promptmill_workers.engines.contract import EngineRequest;"
        "from promptmill_workers.engines.mlx_lm.backend import MlxBackend;"
        f"counter = MlxBackend.token_counter(Path({str(folder)!r}));"
        "print(counter.context_tokens, counter.count(EngineRequest(0, SamplingParams(), prompt='a free phone')));"
        "print([name for name in sys.modules if name.split('.')[0] in ('mlx', 'mlx_lm')])"
    )

    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)

    counted, loaded = done.stdout.strip().splitlines()
    ids = MlxTokenizer(folder).tokens(EngineRequest(0, SamplingParams(), prompt="a free phone"))
    assert counted == f"512 {len(ids)}"
    assert loaded == "[]"
    assert done.stderr == ""


def test_the_bundled_model_says_the_same_with_both_engines() -> None:
    llamacpp = pytest.importorskip("promptmill_workers.engines.llama.backend")
    lines = (ROOT / "datasets" / "ad_comments.jsonl").read_text(encoding="utf-8").strip().split("\n")[::9]
    rules = "You are a moderator of comments. Decide whether the comment is an advertisement. Answer with JSON."
    requests = [
        chat(key, system=rules, text=f"Comment: {json.loads(line)['comment']}", max_tokens=32)
        for key, line in enumerate(lines)
    ]
    said = []
    for kind, file in ((MlxBackend, "mlx"), (llamacpp.LlamaBackend, "demo.gguf")):
        engine = Scheduler(kind.load(bundled(file), "demo", EngineOptions(slots=8, threads=1)))
        said.append(
            {
                key: (finished(event).text, finished(event).usage.prompt_tokens)
                for key, event in run(engine, requests).items()
            }
        )
        engine.close()

    assert len(said[0]) == len(lines) >= 20
    assert said[0] == said[1]


def test_choices_are_as_likely_with_both_engines() -> None:
    """Where one choice begins another, the end of the answer is scored with each: the same token by both."""
    llamacpp = pytest.importorskip("promptmill_workers.engines.llama.backend")
    found = []
    for kind, file in ((MlxBackend, "mlx"), (llamacpp.LlamaBackend, "demo.gguf")):
        desk = wrapped(Scheduler(kind.load(bundled(file), "demo", EngineOptions(slots=2, threads=1))))
        desk.add([chat(0, system="Be brief.", text="hello", choices=("I", "I am", "no"))])
        events: list[Event] = []
        while not events:
            events.extend(desk.step())
        found.append(finished(events[0]).extras)
        desk.close()

    of_mlx, of_llama = (each.choice_probs if each else None for each in found)
    assert of_mlx is not None
    assert of_mlx == pytest.approx(of_llama, abs=1e-3)
